"""Pictures: of a training run, of attention maps, of what changes along a text."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED = 40  # up to so many tokens a map has room for their texts
WIDE = 130  # and a strip
MAP_SCALES = ("row", "map")


def plot_loss(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over the tokens seen.

    Args:
        records: what metrics.jsonl holds: lines with ``tokens`` and ``loss`` (training) or ``val_loss``.
        path: the PNG to write.
        title: the line above the picture.
    """
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    if train:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, _smooth(losses), color="tab:blue", linewidth=1.6, label="training (smoothed)")
    if validation:
        tokens, losses = zip(*validation, strict=True)
        axes.plot(tokens, losses, "o-", color="tab:orange", markersize=4, label="validation (held out)")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="both", alpha=0.25)
    axes.set_title(title)
    if train or validation:
        axes.legend()
    _png(figure, path)


def attention_map(
    weights: ArrayLike,
    path: Path | None = None,
    tokens: Sequence[str] | None = None,
    title: str = "",
    *,
    names: Sequence[str] | None = None,
    scale: str = "row",
    columns: int = 3,
) -> bytes:
    """Draw one or several attention maps: row t shows how much token t reads of each token j.

    Red is positive, blue negative, white 0; what lies after t, and cannot be read, is grey where it is 0 in all rows.

    Args:
        weights: ``[T, T]`` or ``[N, T, T]``, of any sign, for example a row of `hla.reference.weights`.
        path: the PNG to write, or None.
        tokens: the texts of the T tokens, shown at the axes if there are at most 40 of them.
        title: the line above the picture.
        names: N texts, one above each map.
        scale: what full colour means: ``"row"``, the largest size in that row (every row shows what it reads most); or
            ``"map"``, the largest in the map (rows of small weights stay pale).
        columns: maps beside each other.

    Returns:
        The PNG.

    Raises:
        ValueError: weights of another shape, texts or names of another number, or an unknown scale.
    """
    maps = np.asarray(weights, dtype=np.float64)
    maps = maps[None] if maps.ndim == 2 else maps
    if maps.ndim != 3 or maps.shape[1] != maps.shape[2] or not maps.size:
        raise ValueError(f"weights must have shape [T, T] or [N, T, T], T and N at least 1; got {list(maps.shape)}")
    count, length, _ = maps.shape
    for what, given, expected in (("tokens", tokens, length), ("names", names, count)):
        if given is not None and len(given) != expected:
            raise ValueError(f"{what} must be {expected} texts; got {len(given)}")
    if scale not in MAP_SCALES:
        raise ValueError(f"scale must be one of {MAP_SCALES}; got {scale!r}")

    import matplotlib

    largest = np.abs(maps).max(axis=-1 if scale == "row" else (-2, -1), keepdims=True)
    maps = maps / np.where(largest > 0, largest, 1)
    if not np.triu(maps, 1).any():
        maps = np.where(np.tri(length, dtype=bool), maps, np.nan)
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#ebebeb")
    labels = tokens if tokens is not None and length <= LABELLED else None
    columns = min(count, columns)
    rows = -(-count // columns)
    side = max(3.6, 0.17 * length + 0.8) if labels else 4.0
    figure = _figure(columns * side + 0.8, rows * (side + 0.2) + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= count:
            axes.axis("off")
            continue
        image = axes.imshow(maps[i], cmap=colours, vmin=-1, vmax=1)
        if names:
            axes.set_title(names[i], fontsize=10)
        # Texts only at the left and below, as all maps have the same: hundreds of them are slow to lay out.
        bottom, left = i >= count - columns, i % columns == 0
        if labels:
            axes.set_xticks(range(length), labels if bottom else [], rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(length), labels if left else [], fontsize=7, parse_math=False)
        if bottom:
            axes.set_xlabel("token that is read")
        if left:
            axes.set_ylabel("token that reads")
    of = "in its row" if scale == "row" else "in the map"
    figure.colorbar(image, ax=grid, shrink=0.9 / rows, pad=0.01, label=f"weight / largest |weight| {of}")
    if title:
        figure.suptitle(title, parse_math=False)
    return _png(figure, path)


class Panel(NamedTuple):
    """One set of axes of `curves` or `strips`.

    values: ``[N, points]``, one line of a curve or row of a strip per head. title: above it. log: a logarithmic scale
    (values above 0). limits: the ends of the scale, by default those of the values.
    """

    values: ArrayLike
    title: str
    log: bool = False
    limits: tuple[float, float] | None = None


def curves(
    panels: Sequence[Panel], x: Sequence[int], path: Path | None = None, names: Sequence[str] | None = None
) -> bytes:
    """Draw several panels of lines beside each other, the i-th line of each in the same colour; returns the PNG.

    Args:
        panels: at least one, all with ``[N, points]`` values.
        x: the position of each point in the text.
        path: the PNG to write, or None.
        names: what the lines are called in the legend; panels may have fewer lines.
    """
    import matplotlib

    figure = _figure(4.2 * len(panels) + 0.8, 3.4)
    legend: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        lines = np.asarray(panel.values, dtype=np.float64)
        few = len(lines) <= 10
        palette = matplotlib.colormaps["tab10" if few else "viridis"]
        for n, line in enumerate(lines):
            (artist,) = axes.plot(x, line, color=palette(n if few else n / (len(lines) - 1)), linewidth=1.2)
            if names is not None and n < len(names):
                legend.setdefault(names[n], artist)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("position")
        axes.set_yscale("log" if panel.log else "linear")
        axes.set_ylim(panel.limits)
        axes.grid(True, alpha=0.25)
    if len(legend) > 1:
        figure.legend(list(legend.values()), list(legend), loc="outside right center", fontsize=8)
    return _png(figure, path)


def strips(panels: Sequence[Panel], path: Path | None = None, tokens: Sequence[str] | None = None) -> bytes:
    """Draw values per head and token as colours, a strip of one row per head for each panel; returns the PNG.

    Curves that jump from token to token cover each other; colours do not.

    Args:
        panels: at least one, all with ``[heads, T]`` values.
        path: the PNG to write, or None.
        tokens: the texts of the T tokens, shown below the strips if there are at most 130 of them.
    """
    from matplotlib.colors import LogNorm, Normalize

    grids = [np.asarray(panel.values, dtype=np.float64) for panel in panels]
    heights = [0.7 + 0.22 * len(grid) for grid in grids]
    labels = tokens if tokens is not None and len(tokens) <= WIDE else None
    figure = _figure(15, sum(heights) + (1.0 if labels else 0.4))
    rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights).flat
    for axes, grid, panel in zip(rows, grids, panels, strict=True):
        low, high = panel.limits or (grid.min(), grid.max())
        norm = (LogNorm if panel.log else Normalize)(low, high)
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_yticks(range(len(grid)), [str(head) for head in range(len(grid))], fontsize=8)
        axes.set_ylabel("head")
        figure.colorbar(image, ax=axes, pad=0.005, aspect=8)
    if labels:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
    else:
        axes.set_xlabel("position")
    return _png(figure, path)


def _figure(width: float, height: float) -> Figure:
    """A figure of so many inches that is drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure, path: Path | None) -> bytes:
    """The PNG of a figure, also written to ``path``: as a whole or not at all."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script the font lacks is shown as boxes
        figure.savefig(buffer, dpi=120, format="png")
    if path is not None:
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(buffer.getvalue())
        os.replace(draft, path)
    return buffer.getvalue()


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over a centred window of a twentieth of the run, shorter at its ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
