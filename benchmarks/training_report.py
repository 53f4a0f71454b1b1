"""Table and plot of what `benchmarks.training` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hla.models import SIZES

HLA, SOFTMAX, LLAMA, DELTA, GLA = "HLA", "softmax", "Llama", "GatedDeltaNet", "GLA"
WIDER = "softmax, as many weights"
Row = dict[str, Any]
SPEED = (
    "size", "model", "T", "recompute", "ms_per_step", "tokens_per_s", "mfu", "mfu_measured", "peak_mib", "vs_softmax",
    "error",
)  # fmt: skip
LONGEST = (
    "model", "method", "T", "seconds", "tokens_per_s", "peak_mib", "loss", "gradient_norm", "difference", "error",
)  # fmt: skip


def print_table(rows: list[Row]) -> None:
    """In Markdown, for docs/training-speed.md; of either kind of rows."""
    columns = LONGEST if "method" in rows[0] else SPEED
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        cells = {**row, "T": f"{int(row['T']):,}"}
        if row["tokens_per_s"] != "":
            cells["tokens_per_s"] = f"{int(row['tokens_per_s']):,}"
        if row["peak_mib"] != "":
            cells["peak_mib"] = f"{float(row['peak_mib']) / 1024:.1f} GiB"
        print("| " + " | ".join(str(cells[name]) for name in columns) + " |")


def plot(rows: list[Row], path: Path) -> None:
    """Tokens per second against the context, a panel per size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [{**r, "T": int(r["T"]), "tokens_per_s": float(r["tokens_per_s"])} for r in rows if r["tokens_per_s"] != ""]
    sizes = [s for s in SIZES if any(r["size"] == s for r in rows)]
    styles = {HLA: "o-", SOFTMAX: "s--", LLAMA: "^:", DELTA: "x-.", GLA: "d-.", WIDER: "v--"}
    figure, axes = plt.subplots(1, len(sizes), figsize=(1 + 3.8 * len(sizes), 3.8), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for i, (kind, style) in enumerate(styles.items()):
            found = sorted((r["T"], r["tokens_per_s"]) for r in rows if (r["size"], r["model"]) == (size, kind))
            if found:
                axis.plot(*zip(*found, strict=True), style, color=f"C{i}", label=kind, markersize=4, lw=1.2)
        ticks = sorted({r["T"] for r in rows})
        top = 1.08 * max(r["tokens_per_s"] for r in rows if r["size"] == size)
        axis.set(xscale="log", xlabel="context (tokens)", title=size, ylim=(0, top))
        axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("training tokens per second")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines}  # (not every model has every size)
    axes[0][0].legend(lines.values(), lines, fontsize=8)
    figure.suptitle(rows[0]["device"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
