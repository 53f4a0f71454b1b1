"""Tables and plot of the GPU suite's rows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KERNELS = ("kernels_forward", "kernels_forward_backward")

# Per table: (heading, columns of a row joined by " / ")
SHAPES = (
    ("fwd ms", "forward_ms"),
    ("x flash", "forward_vs_flash"),
    ("x fla composed", "forward_vs_composed"),
    ("of floor", "forward_fraction"),
    ("fwd + bwd ms", "forward_backward_ms"),
    ("x flash", "forward_backward_vs_flash"),
    ("x fla composed", "forward_backward_vs_composed"),
    ("of floor", "forward_backward_fraction"),
    ("peak MiB", "peak_mib"),
    ("saved MiB", "saved_mib"),
    ("kernels", " ".join(KERNELS)),
    ("first call s", "first_call_s"),
)
DECODE = (("us", "us"), ("floor us", "floor_us"), ("of floor", "fraction_of_floor"), ("kernels", "kernels"))
COLD_START = (("call", "call"), ("T", "T"), ("seconds", "seconds"), ("kernels compiled", "kernels_compiled"))


def read(path: Path) -> list[Row]:
    """Rows of a CSV file, numbers as numbers; none if there is no file."""

    def value(text: str) -> float | str:
        try:
            return int(text) if text.isdecimal() else float(text)
        except ValueError:
            return text

    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def print_tables(results: dict[str, list[Row]]) -> None:
    """One table per part that has rows; rows that failed say why."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 180)
    shapes, tokens, starts = (results[part] for part in ("shapes", "decode", "cold-start"))
    for rows, columns, title in (
        (shapes, SHAPES, "forward and backward"),
        (tokens, DECODE, "one token in a CUDA graph"),
        (starts, COLD_START, "a new process"),
    ):
        if not rows:
            continue
        table = Table(title=f"{rows[0]['device']}: {title}")
        table.add_column("shape", no_wrap=True)
        table.add_column("operator")
        for heading, _ in columns:
            table.add_column(heading, justify="right")
        last = None
        for row in rows:
            shape = _shape(row)
            if shape != last:
                table.add_section()
            cells = [" / ".join(str(row[c]) for c in names.split() if row[c] != "") for _, names in columns]
            table.add_row(shape if shape != last else "", row["operator"], *cells)
            last = shape
        console.print(table)
        for row in rows:
            if row["error"]:
                console.print(f"{_shape(row)} {row['operator']}: {row['error']}", markup=False, highlight=False)


def _shape(row: Row) -> str:
    if "forward_ms" in row:
        return f"{row['B']}x{row['T']}x{row['H']}x{row['D']}"
    return f"B {row['B']}" if "us" in row else row["operator"]


def plot(rows: list[Row], path: Path) -> None:
    """Forward + backward per shape, one bar per operator; a dash across a bar is its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["forward_backward_ms"] != ""]
    if not rows:
        return
    shapes = list(dict.fromkeys(map(_shape, rows)))
    names = list(dict.fromkeys(row["operator"] for row in rows))
    colors = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    figure, ax = plt.subplots(figsize=(13, 5.5))
    left, ticks = 0.0, []
    for shape in shapes:
        own = [row for row in rows if _shape(row) == shape]
        ticks.append(left + (len(own) - 1) / 2)
        for i, row in enumerate(own):
            x, y = left + i, row["forward_backward_ms"]
            peer = row["operator"].startswith(("sdpa", "fla "))
            ax.bar(x, y, color=colors.get(row["operator"]), width=0.9, hatch="//" if peer else None, edgecolor="white")
            ax.annotate(f"{y:.3g}", (x, y), ha="center", va="bottom", fontsize=7, rotation=90, xytext=(0, 2),
                        textcoords="offset points")  # fmt: skip
            if row["floor_forward_backward_ms"] != "":
                ax.hlines(row["floor_forward_backward_ms"], x - 0.45, x + 0.45, color="black", linewidth=1.2)
        left += len(own) + 1.5
    ax.set(yscale="log", ylabel="forward + backward, ms (lower is better)")
    drawn = [row[c] for row in rows for c in ("forward_backward_ms", "floor_forward_backward_ms") if row[c] != ""]
    ax.set_ylim(min(drawn) / 1.5, max(drawn) * 2)
    ax.set_xticks(ticks, [s.replace("x", " x ") for s in shapes])
    ax.set_xlabel("batch x tokens x heads x head dimension")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=colors.get(name)) for name in names]
    handles.append(plt.Line2D([], [], color="black"))
    figure.legend(handles, [*names, "floor"], loc="lower center", ncol=4, frameon=False, fontsize=8)
    first = rows[0]
    ax.set_title(f"{first['device']}, {first['dtype']}, causal; torch {first['torch']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.05 + 0.03 * (len(names) // 4 + 1), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
