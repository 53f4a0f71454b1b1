"""The figure of `benchmarks.scale.gpus`: what was measured on several GPUs, and what the formulas expect."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

Rows = list[dict[str, str]]
TARGET = 0.9  # of the efficiency


def plot(operators: Path, training: Path, path: Path) -> None:
    """Operators: times against the length, and efficiency. Training: milliseconds of a step on each mesh.

    Args:
        operators, training: the two CSV files; one of them may be missing.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.5))
    rows = _read(operators)
    for i, op in enumerate(dict.fromkeys(r["operator"] for r in rows)):
        own = [r for r in rows if r["operator"] == op]
        _line(left, own, "alone_both_ms", f"{op}, one GPU", color=f"C{i}", linestyle=":")
        for gpus in dict.fromkeys(r["gpus"] for r in own):
            some = [r for r in own if r["gpus"] == gpus]
            _line(left, some, "both_ms", f"{op}, {gpus} GPUs", color=f"C{i}", marker="o")
            _line(left, some, "expected_both_ms", f"{op}, {gpus} GPUs, expected", color="grey", marker="x")
            _line(middle, some, "efficiency", f"{op}, {gpus} GPUs", color=f"C{i}", marker="o")
    left.set(xscale="log", yscale="log", title="one sequence, forward + backward, ms")
    middle.axhline(TARGET, color="grey", linestyle="--", label="to be reached")
    middle.set(xscale="log", ylim=(0, 1.05), title="efficiency: one GPU / (GPUs x time)")
    lengths = sorted({int(r["T"]) for r in rows})
    for axes in (left, middle):
        axes.set_xticks(lengths, [f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}k" for n in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of the sequence")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    steps = [r for r in _read(training) if r["ms_per_step"]]
    names = [" ".join(f"{n} {r[n]}" for n in ("dp", "sp", "tp") if r[n] != "1") or "one GPU" for r in steps]
    right.bar(range(len(steps)), [float(r["ms_per_step"]) for r in steps], 0.6, label="measured")
    expected = [(i, float(r["expected_ms"])) for i, r in enumerate(steps) if r["expected_ms"]]
    right.plot([i for i, _ in expected], [y for _, y in expected], "kx", label="expected")
    right.set_xticks(range(len(steps)), names)
    right.set_title("a training step with parallelize_hla, ms", fontsize=12)
    right.legend(fontsize=8)
    found = rows or steps
    figure.suptitle(f"{found[0]['gpus']} x {found[0]['device']}" if found else "nothing measured", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axes: Any, rows: Rows, column: str, label: str, **style: Any) -> None:
    """A line through the rows that have a number there."""
    points = sorted((int(r["T"]), float(r[column])) for r in rows if r[column])
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _read(path: Path) -> Rows:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
