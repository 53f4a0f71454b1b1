"""The figure of `benchmarks.quality.plateau`, from its CSV and that of the comparison on a GPU."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

COMPARISON = Path("benchmarks/results/quality_mqar.csv")
COUNTED = "hla2, p=k, k~/count, identity"
Rows = list[dict[str, Any]]
CHANCE = math.log(64)
SHORT = {COUNTED: "hla2, p=k, k~/count"}
ZERO_MEAN = ("hla2, identity", "hla2, p=k, identity")
PREDICTOR = "signal to noise, same token"
COLORS = {
    "linear": "black",
    "hla2": "tab:red",
    "hla2, p=q, residual": "lightcoral",
    "hla2, p=k": "tab:orange",
    COUNTED: "gold",
    "hla2, p=k, |k~|=1": "tab:olive",
    "hla2, p=k, residual": "tab:cyan",
    "ahla": "tab:purple",
    "hla3": "tab:pink",
    "protecting": "tab:blue",
    "query 4": "tab:green",
}


def features_of(arm: str) -> str:
    return "identity" if arm.endswith("identity") else "silu"


def select(rows: Rows, measurement: str, arm: str | None = None, parameter: str | None = None) -> Rows:
    """Rows with the features that the arm has in the comparison."""
    return [
        r
        for r in rows
        if r["measurement"] == measurement
        and (arm is None or (r["arm"] == arm and r["features"] == features_of(arm)))
        and (parameter is None or r["parameter"] == parameter)
    ]


def curve(rows: Rows) -> tuple[list[float], list[float]]:
    return [float(r["position"]) for r in rows], [float(r["value"]) for r in rows]


def plot(source: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with open(source) as file:
        rows: Rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(2, 3, figsize=(18, 11))
    for ax, draw in zip(axes.flat, (_spectrum, _growth, _reading, _comparison, _settings, _losses), strict=True):
        draw(ax, rows)
        ax.grid(alpha=0.3)
    figure.suptitle(
        "Why recall starts late: (b, c) at the start of training, T = 256, 16 pairs, one head of 32; (d) trained with "
        "that head on a GPU; (a, e, f) trained small, T = 64, 8 pairs, one head of 16"
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _spectrum(ax: Any, rows: Rows) -> None:
    """Means over the seeds that still run at a step (runs stop at half of the chance loss)."""
    arms = [*COLORS, *ZERO_MEAN]
    for arm in arms:
        seeds: dict[int, list[float]] = {}
        for seed in range(3):
            for r in select(rows, "trained spectrum", arm, f"lr 0.003 warmup 0.1 seed {seed}: layer 1"):
                seeds.setdefault(int(r["position"]), []).append(16 * float(r["value"]))
        if seeds:
            style = "--" if arm in ZERO_MEAN else "-"
            means = [sum(v) / len(v) for v in seeds.values()]
            color = COLORS.get(arm) or COLORS[arm.removesuffix(", identity")]
            ax.plot(list(seeds), means, style, marker="o", markersize=3, color=color, label=SHORT.get(arm, arm))
    ax.axhline(1, color="grey", linestyle=":")
    ax.text(0, 1.15, "isotropic", fontsize=8)
    ax.axhline(16, color="grey", linestyle=":")
    ax.text(0, 16.1, "one direction", fontsize=8)
    ax.set(xlabel="step", ylim=(0, 17), title="(a) largest over mean eigenvalue of S, layer 1 (small task)")
    ax.legend(fontsize=7, loc="lower right", ncol=2)


def _growth(ax: Any, rows: Rows) -> None:
    for arm, color in COLORS.items():
        found = select(rows, "growth", arm, "o")
        if not found:
            continue
        x, y = curve(found)
        slope = float(select(rows, "growth", arm, "exponent of o")[0]["value"])
        first = y[x.index(16)]
        ax.plot(
            x, [v / first for v in y], "o-", markersize=3, color=color, label=f"{SHORT.get(arm, arm)}: t^{slope:.2f}"
        )
    ax.set(xscale="log", yscale="log", xlabel="position t", title="(b) |o_t| before its norm, over |o_16|")
    ax.legend(fontsize=8)


def _reading(ax: Any, rows: Rows) -> None:
    arms = [a for a in COLORS if select(rows, "reading", a)]
    modes = (("start", "lightgrey"), ("same token", "tab:blue"), ("previous token", "tab:orange"))
    for i, (mode, color) in enumerate(modes):
        values = [float(select(rows, "reading", a, f"signal to noise, {mode}")[0]["value"]) for a in arms]
        ax.barh([n + 0.27 * (i - 1) for n in range(len(arms))], values, 0.27, color=color, label=mode)
    ax.set_yticks(range(len(arms)), [SHORT.get(a, a) for a in arms])
    ax.invert_yaxis()
    ax.set(title="(c) weight of the answer over the norm of all others", xlabel="signal to noise")
    ax.legend(fontsize=8, title="q and k")


def _comparison(ax: Any, rows: Rows) -> None:
    with open(COMPARISON) as file:
        trained = [r for r in csv.DictReader(file) if r["track"] == "width" and r["seed"] == "0"]
    for arm, color in COLORS.items():
        found = select(rows, "reading", arm, PREDICTOR)
        scores = [float(r["validation"]) for r in trained if r["arm"] == arm and r["validation"]]
        if found and scores:
            x = float(found[0]["value"])
            ax.plot([x] * len(scores), scores, "o-", color=color)
            shift = {
                "linear": (-34, 4),
                "hla2, p=q, residual": (-98, -2),
                "hla3": (6, -12),
                "query 4": (-42, 0),
                COUNTED: (-60, -22),
            }.get(arm, (4, 4))
            label = SHORT.get(arm, arm)
            ax.annotate(label, (x, max(scores)), xytext=shift, textcoords="offset points", fontsize=8)
    ax.set(
        xlabel="signal to noise, same token (blue bars of c)",
        title="(d) validation accuracy after 3000 steps, both rates",
        ylim=(-0.03, 1.05),
    )


def kind_of(run: str) -> str:
    _, lr, _, warmup, _, _, *start = run.split()
    if start:
        return f"size {start[1]}"
    return f"rate {lr}" if lr != "0.003" else f"warm-up {warmup}" if warmup != "0.1" else "default"


def _settings(ax: Any, rows: Rows) -> None:
    markers = {
        "default": "o",
        "rate 0.001": "<",
        "rate 0.01": ">",
        "warm-up 0.02": "v",
        "warm-up 0.3": "^",
        "size e^-5": "1",
        "size e^-3": "2",
        "size e^-1": "3",
        "size e^0": "4",
    }
    end = 800
    ends = [r for r in rows if r["measurement"] == "plateau" and r["parameter"].endswith("below 0.9 of chance")]
    arms = [*(a for a in COLORS), *sorted({r["arm"] for r in ends} - set(COLORS))]
    for r in ends:
        kind = kind_of(r["parameter"].partition(": ")[0])
        y = arms.index(r["arm"]) + 0.09 * (list(markers).index(kind) - 4)
        # Runs that never got there stand in the grey band, one seed beside the other.
        seed = int(r["parameter"].partition(": ")[0].split()[5])
        x = float(r["value"]) if r["value"] else end + 45 + 28 * seed
        ax.plot([x], [y], markers[kind], color=COLORS.get(r["arm"], "grey"), markersize=6)
    for kind, marker in markers.items():
        ax.plot([], [], marker, color="grey", linestyle="", label=kind)
    ax.axvspan(end + 15, end + 130, color="lightgrey", alpha=0.5)
    ax.set_yticks(range(len(arms)), [SHORT.get(a, a) for a in arms])
    ax.set_xticks([*range(0, end + 1, 200), end + 73], [*(str(x) for x in range(0, end + 1, 200)), "never"])
    ax.set(xlim=(0, end + 130), ylim=(-0.6, len(arms) - 0.4))
    ax.set(xlabel="step", title="(e) first step below 0.9 of chance, every run")
    ax.invert_yaxis()
    for y in range(1, len(arms)):
        ax.axhline(y - 0.5, color="lightgrey", linewidth=0.6)
    ax.legend(fontsize=7, loc="center left")


def _losses(ax: Any, rows: Rows) -> None:
    for arm, color in COLORS.items():
        for seed in range(3):
            found = select(rows, "loss", arm, f"lr 0.003 warmup 0.1 seed {seed}")
            if found:
                ax.plot(*curve(found), color=color, linewidth=1.2, label=None if seed else SHORT.get(arm, arm))
    ax.axhline(CHANCE, color="grey", linestyle=":", label="chance")
    ax.set(xlabel="step", ylabel="loss", title="(f) loss of three seeds, up to half of chance")
    ax.legend(fontsize=8, loc="lower left")


if __name__ == "__main__":
    plot(Path("benchmarks/results/quality_plateau.csv"), Path("benchmarks/results/quality_plateau.png"))
