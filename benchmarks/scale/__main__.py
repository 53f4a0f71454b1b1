"""Memory, bytes and expected time of training on many GPUs, on paper; and runs of processes that count the bytes.

python -m benchmarks.scale            # table, benchmarks/results/scale.csv and scale.png
python -m benchmarks.scale --check    # the formulas against what 2 and 4 processes send and keep
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import say, write_csv
from benchmarks.scale import formulas
from benchmarks.scale.times import Links, Rates, step
from hla.models import HLAConfig, count_parameters

METHODS = {"hla": "HLA", "ring": "ring attention", "ulysses": "Ulysses"}
TOKENS = (1 << 17, 1 << 19, 1 << 20, 1 << 22)
GPUS = (8, 64, 256, 1024)


def rows_of(size: str, gpus: int, tokens: int, rates: Rates, links: Links, gigabytes: float) -> list[dict[str, Any]]:
    """One sequence on all GPUs; and on as few as it fits on, with other sequences on the others."""
    config = formulas.config_of(size)
    groups = [2**i for i in range(gpus.bit_length()) if 2**i <= gpus and tokens % 2**i == 0]
    fits = [sp for sp in groups if needed(config, rates, gpus, sp, tokens, True).total <= gigabytes * 1e9]
    layouts = {"all GPUs": gpus}
    if fits and fits[0] != gpus:
        layouts["fewest GPUs"] = fits[0]
    return [row(size, config, gpus, sp, tokens, name, rates, links, gigabytes) for name, sp in layouts.items()]


def needed(config: HLAConfig, rates: Rates, gpus: int, sp: int, tokens: int, checkpointing: bool) -> formulas.Memory:
    return formulas.memory(
        config, ranks=gpus, sp=sp, tokens=tokens, checkpointing=checkpointing,
        working_bytes=rates.working_bytes(config),
    )  # fmt: skip


def row(
    size: str, config: HLAConfig, gpus: int, sp: int, tokens: int, layout: str, rates: Rates, links: Links,
    gigabytes: float,
) -> dict[str, Any]:  # fmt: skip
    memories = {again: needed(config, rates, gpus, sp, tokens, again) for again in (False, True)}
    checkpointing = memories[False].total > gigabytes * 1e9
    memory = memories[checkpointing]
    result: dict[str, Any] = {
        "size": size, "gpus": gpus, "tokens": tokens, "layout": layout, "sp": sp, "dp": gpus // sp,
        "tokens_per_gpu": tokens // sp, "checkpointing": int(checkpointing),
        "fits": int(memory.total <= gigabytes * 1e9),
    }  # fmt: skip
    result |= {f"{name}_gb": round(x / 1e9, 3) for name, x in memory._asdict().items()}
    result["memory_gb"] = round(memory.total / 1e9, 2)
    traffic = {
        "hla": formulas.hla_layer(config, sp, checkpointing=checkpointing),
        "ring": formulas.ring_layer(config, sp, tokens, checkpointing=checkpointing),
        "ulysses": formulas.ulysses_layer(config, sp, tokens, checkpointing=checkpointing),
    }
    result |= {f"{name}_bytes_per_layer": "" if t is None else t.total for name, t in traffic.items()}
    result["fsdp_bytes"] = formulas.fsdp_step(config, gpus).total
    for method in METHODS:
        time = step(method, size, config, rates, links, ranks=gpus, sp=sp, tokens=tokens, checkpointing=checkpointing)
        parts = {} if time is None else time._asdict() | {"step": time.total}
        for name in ("products", "between", "mixer", "summaries", "exposed", "step"):
            result[f"{method}_{name}_ms"] = round(1e3 * parts[name], 3) if parts else ""
    result["hla_tokens_per_s_per_gpu"] = round(tokens / sp / result["hla_step_ms"] * 1e3)
    result |= {"rates_from": rates.device, "nvlink_gb_s": links.nvlink / 1e9, "network_gb_s": links.network / 1e9}
    return result


def print_table(rows: list[dict[str, Any]]) -> None:
    """In Markdown, for docs/scale.md."""
    for size in dict.fromkeys(r["size"] for r in rows):
        for layout in dict.fromkeys(r["layout"] for r in rows):
            chosen = [r for r in rows if r["size"] == size and r["layout"] == layout]
            if layout == "fewest GPUs":  # how many others there are makes no difference but to the shards of FSDP2
                chosen = list({(r["tokens"], r["sp"]): r for r in reversed(chosen)}.values())
                chosen.sort(key=lambda r: r["tokens"])
            if not chosen:
                continue
            print(f"\n{size}, a sequence on {layout}\n")
            print("| GPUs | tokens | memory | HLA, MiB | ring | Ulysses | HLA, step (waits) | ring | Ulysses |")
            print("|" + "---|" * 9)
            for r in chosen:
                memory = f"{r['memory_gb']:.0f} GB" + " c" * r["checkpointing"]
                values = [_mib(r[f"{m}_bytes_per_layer"]) for m in METHODS]
                steps = [_seconds(r[f"{m}_step_ms"]) for m in METHODS]
                steps[0] += f" ({r['hla_exposed_ms'] / r['hla_step_ms']:.0%})"
                if not r["fits"]:
                    steps = ["does not fit", "", ""]
                print("| " + " | ".join([str(r["sp"]), _short(r["tokens"]), memory, *values, *steps]) + " |")


def _short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def _mib(x: int | str) -> str:
    if x == "":
        return "-"
    mib = int(x) / 2**20
    return f"{mib:,.0f}" if mib >= 10 or mib == 0 else f"{mib:.1f}"


def _seconds(ms: float | str) -> str:
    return "-" if ms == "" else f"{float(ms) / 1e3:.3g} s"


def plot(rows: list[dict[str, Any]], size: str, path: Path) -> None:
    """Bytes per rank and layer against tokens; where the time of a step goes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    config = formulas.config_of(size)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), gridspec_kw={"width_ratios": [1, 1.25]})
    lengths = [1 << i for i in range(14, 23)]
    for sp, style in ((8, "-"), (64, "--")):
        lines: dict[str, list[formulas.Traffic | None]] = {
            "hla": [formulas.hla_layer(config, sp) for _ in lengths],
            "ring": [formulas.ring_layer(config, sp, n) for n in lengths],
            "ulysses": [formulas.ulysses_layer(config, sp, n) for n in lengths],
        }
        for i, (method, values) in enumerate(lines.items()):
            sizes = [t.total / 2**20 for t in values if t is not None]
            if sizes:
                left.plot(lengths, sizes, style, color=f"C{i}", label=f"{METHODS[method]}, {sp} GPUs")
    left.set(xscale="log", yscale="log", xlabel="tokens of the sequence")
    left.set_title("received per GPU and layer, forward + backward, MiB", fontsize=10)
    left.set_xticks(lengths[::2], [_short(n) for n in lengths[::2]])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(fontsize=8)

    tokens = 1 << 20
    chosen = [r for r in rows if r["size"] == size and r["tokens"] == tokens and r["layout"] == "all GPUs"]
    parts = {"products": "matrix products", "between": "norms, convolution, activations", "mixer": "mixer",
             "summaries": "summaries, fold", "exposed": "waiting"}  # fmt: skip
    bottom = [0.0] * len(chosen)
    for part, label in parts.items():
        heights = [r[f"hla_{part}_ms"] / 1e3 for r in chosen]
        right.bar(range(len(chosen)), heights, 0.6, bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for x, (y, r) in enumerate(zip(bottom, chosen, strict=True)):
        others = "\n".join(
            f"{METHODS[m]}: {_seconds(r[f'{m}_step_ms']) if r[f'{m}_step_ms'] != '' else 'too few heads'}"
            for m in ("ring", "ulysses")
        )
        text = f"{_seconds(1e3 * y)}\n({others})"
        right.annotate(text, (x, y), ha="center", va="bottom", fontsize=8, xytext=(0, 3), textcoords="offset points")
    right.set_xticks(
        range(len(chosen)),
        [f"{r['gpus']} GPUs" + "\n(with checkpointing)" * r["checkpointing"] for r in chosen],
        fontsize=8,
    )
    right.set_title(f"a step of one sequence of {_short(tokens)} tokens with HLA, seconds", fontsize=10)
    right.set_ylim(0, max(bottom) * 1.25)
    right.set_xlim(-0.6, len(chosen) - 0.4)
    right.legend(fontsize=8, loc="upper center")
    figure.suptitle(f"On paper: {size} ({count_parameters(config) / 1e9:.2f}B parameters)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="count bytes in runs of processes instead")
    parser.add_argument("--ranks", type=int, nargs="+", choices=(2, 4), default=[2, 4], help="of these runs")
    parser.add_argument("--sizes", nargs="+", choices=("base", "medium", "large"), default=["large", "medium"])
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="of a sequence")
    parser.add_argument("--memory", type=float, default=72, help="GB of a GPU that may be used")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s per direction and GPU inside a node")
    parser.add_argument("--network", type=float, default=50, help="GB/s per direction and GPU between nodes")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--latency-us", type=float, default=10, help="of a collective, per doubling of its ranks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.csv"))
    args = parser.parse_args()
    if args.check:
        from benchmarks.scale.counting import run

        sys.exit(0 if all([run(ranks) for ranks in args.ranks]) else 1)
    rates = Rates()
    links = Links(1e9 * args.nvlink, 1e9 * args.network, args.node, 1e-6 * args.latency_us)
    rows = [
        r
        for size in args.sizes
        for gpus in args.gpus
        for tokens in args.tokens
        for r in rows_of(size, gpus, tokens, rates, links, args.memory)
    ]
    print_table(rows)
    write_csv(args.out, rows)
    plot(rows, args.sizes[0], args.out.with_suffix(".png"))
    say(f"wrote {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
