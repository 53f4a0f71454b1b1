"""The paper's third order against the width K = V: Algorithm 4 with its segment maps, the recurrence, the chunk form.

Algorithm 4's maps hold K^3 V numbers per segment, and combining two costs as much; the recurrence costs O(K (K + V)) a
token but runs token by token; the chunk form is a composition of linear attentions, O(T K (K + V)).

    python -m benchmarks.published
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hla
from benchmarks.measure import environment, interleaved_medians, peak_bytes, say, write_csv

FORMS = ("scan", "recurrent", "chunk")


def measure(K: int, length: int, heads: int, device: str, seconds: float) -> list[dict[str, Any]]:
    """Rows of one width: milliseconds forward + backward and peak memory of each form, "" where a form refuses."""
    generator = torch.Generator(device).manual_seed(0)
    new = lambda: torch.randn(1, length, heads, K, generator=generator, device=device)  # noqa: E731
    q, k, v, do = (F.normalize(new(), dim=-1) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both(form: str) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(hla.published.hla3(q, k, v, form=form), leaves, do)

    refused: dict[str, str] = {}
    functions: dict[str, Callable[[], object]] = {}
    for form in FORMS:
        try:
            both(form)()
            functions[form] = both(form)
        except ValueError as error:
            refused[form] = str(error)
    times = interleaved_medians(functions, device, seconds)
    rows = []
    for form in FORMS:
        memory = None if form in refused else peak_bytes(both(form), device)
        rows.append(
            {
                "form": form,
                "K": K,
                "T": length,
                "H": heads,
                "forward_backward_ms": "" if form in refused else round(times[form], 3),
                "peak_mib": "" if memory is None else round(memory / 2**20, 2),
                "refused": refused.get(form, ""),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    labels = {"scan": "Algorithm 4 (scan)", "recurrent": "Algorithm 3 (token by token)", "chunk": "chunk form"}
    for ax, column, title in zip(
        axes, ("forward_backward_ms", "peak_mib"), ("time, ms", "peak memory, MiB"), strict=True
    ):
        for form in FORMS:
            points = [(r["K"], r[column]) for r in rows if r["form"] == form and r[column] != ""]
            ax.plot(*zip(*points, strict=True), marker="o", label=labels[form])
            # The slope the form should have, through its last point; overheads hide that of the chunk form's time.
            if form == "scan" or (form == "chunk" and column == "peak_mib"):
                (k, y), power = points[-1], 4 if form == "scan" else 2
                ks = [k / 2, k]
                ax.plot(ks, [y * (x / k) ** power for x in ks], color="black", linestyle=":", linewidth=1)
                ax.annotate(
                    f"K^{power}", (ks[0], y * 0.5**power), fontsize=8, textcoords="offset points", xytext=(0, -10)
                )
        ks = sorted({r["K"] for r in rows})
        ax.set(xscale="log", yscale="log", xlabel="K = V", title=title)
        ax.set_xticks(ks, map(str, ks))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    first = rows[0]
    figure.suptitle(
        f"Third order, forward + backward: T {first['T']}, {first['H']} head(s); {first['device']}", fontsize=10
    )
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per form and width")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/published_cpu.csv"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for K in args.widths:
        rows += [
            row | environment(args.device) for row in measure(K, args.length, args.heads, args.device, args.seconds)
        ]
        write_csv(args.out, rows)
        say(", ".join(f"K {r['K']} {r['form']}: {r['forward_backward_ms'] or 'refused'} ms" for r in rows[-3:]))
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
