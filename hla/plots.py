"""The picture of a training run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_loss(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over the tokens seen.

    Args:
        records: what metrics.jsonl holds: lines with ``tokens`` and ``loss`` (training) or ``val_loss``.
        path: the PNG to write.
        title: the line above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
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
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=120, format="png")
    os.replace(draft, path)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over a centred window of a twentieth of the run, shorter at its ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
