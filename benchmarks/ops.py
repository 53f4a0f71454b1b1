"""``python -m benchmarks.ops``: the operators beside PyTorch's scaled_dot_product_attention, in one run.

Prints a table with ratios, writes a CSV (one row per operator, length and dtype) and a log-log plot. On a GPU
(``--device cuda``) it is the suite `benchmarks.cuda`, which has its own options and peers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import environment, interleaved_medians, peak_bytes, say, write_csv
from benchmarks.operators import operators, sdpa

BASELINE = "sdpa"


def measure(
    batch: int, length: int, heads: int, dim: int, dtype: torch.dtype, device: str, seconds: float
) -> list[dict]:
    """Rows for one shape: forward and forward + backward milliseconds; peak memory of the latter, above the inputs."""
    generator = torch.Generator(device).manual_seed(0)
    new = lambda: torch.randn(batch, length, heads, dim, generator=generator, device=device)  # noqa: E731
    q, k, v, do = (F.normalize(new(), dim=-1).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    functions = {BASELINE: lambda: sdpa(q, k, v), **operators(q, k, v)}

    def with_backward(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), leaves, do)

    def without_grad(function: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(function)

    forward = interleaved_medians({n: without_grad(f) for n, f in functions.items()}, device, seconds)
    both = interleaved_medians({n: with_backward(f) for n, f in functions.items()}, device, seconds)
    rows: list[dict[str, Any]] = []
    for name, function in functions.items():
        memory = peak_bytes(with_backward(function), device)
        rows.append(
            {
                "operator": name,
                "B": batch,
                "T": length,
                "H": heads,
                "D": dim,
                "dtype": str(dtype).removeprefix("torch."),
                "forward_ms": round(forward[name], 3),
                "forward_backward_ms": round(both[name], 3),
                "peak_mib": "" if memory is None else round(memory / 2**20, 1),
                "forward_speedup": round(forward[BASELINE] / forward[name], 2),
                "forward_backward_speedup": round(both[BASELINE] / both[name], 2),
            }
        )
    baseline = rows[0]["peak_mib"]
    inputs = sum(x.numel() * x.element_size() for x in (q, k, v, do)) / 2**20
    for row in rows:
        row["memory_ratio"] = round(row["peak_mib"] / baseline, 2) if baseline else ""
        row["memory_ratio_with_inputs"] = round((row["peak_mib"] + inputs) / (baseline + inputs), 2) if baseline else ""
    return rows


def print_table(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0]['device']}: times in ms, speed-ups and memory against {BASELINE}")
    for column in ("dtype", "T", "operator", "forward", "x", "fwd + bwd", "x", "peak MiB", "x"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for row in rows:
        if row["operator"] == BASELINE:
            table.add_section()
        keys = (
            "forward_ms",
            "forward_speedup",
            "forward_backward_ms",
            "forward_backward_speedup",
            "peak_mib",
            "memory_ratio",
        )
        table.add_row(row["dtype"], str(row["T"]), row["operator"], *(str(row[key]) for key in keys))
    Console().print(table)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.5), squeeze=False, sharey=True)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        for i, name in enumerate(dict.fromkeys(row["operator"] for row in rows)):
            points = [(r["T"], r["forward_backward_ms"]) for r in rows if r["operator"] == name and r["dtype"] == dtype]
            if not points:
                continue
            style = dict(color="black", linestyle="--") if name == BASELINE else dict(color=f"C{i}")
            ax.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=dtype)
        ax.set_xticks(sorted({r["T"] for r in rows}), [f"{r // 1024}k" for r in sorted({r["T"] for r in rows})])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[0][0].legend()
    first = rows[0]
    figure.suptitle(
        f"B {first['B']}, H {first['H']}, D {first['D']}, causal; {first['device']}, {first['threads']} threads"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device, others = which.parse_known_args()
    if device.device == "cuda":
        from benchmarks.cuda.main import main as on_gpu

        return on_gpu(others)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per operator and shape")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ops_cpu.csv"))
    args = parser.parse_args()
    where = environment(args.device)
    rows: list[dict] = []
    for dtype in args.dtypes:
        for length in args.lengths:
            say(f"{dtype}, T = {length} ...")
            new = measure(args.batch, length, args.heads, args.dim, getattr(torch, dtype), args.device, args.seconds)
            rows += [row | where for row in new]
            write_csv(args.out, rows)  # each shape is kept as soon as it is measured
    print_table(rows)
    plot(rows, args.out.with_suffix(".png"))
    say(f"wrote {args.out} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
