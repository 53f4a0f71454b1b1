"""Tabulates and draws what `benchmarks.quality` found on recall: rankings and training curves, from the CSV alone.

    python -m benchmarks.quality.report

writes ``quality_mqar.md`` and ``quality_width.png``, ``quality_state.png`` and ``quality_curves.png`` beside the CSV.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import say
from benchmarks.quality import mixers
from benchmarks.quality.arms import ARMS
from benchmarks.quality.plan import LRS, TRACKS, Entry
from benchmarks.quality.runner import RESULTS, read_rows
from benchmarks.quality.tasks import LONGER, TRAINED, Recall
from benchmarks.quality.training import CURVE, Job

SETTINGS = [f"{length}x{pairs}" for length, pairs in TRAINED + LONGER]
TITLES = {  # of the tracks on recall
    "width": "Equal width: all arms with q, k and v equally wide",
    "state": "Equal state: the best of three shapes with about the same numbers of state",
}
FAMILIES = {  # in the order of the legend
    "peers": "#8c8c8c",
    "the paper's operators": "#d55e00",
    "protecting, overwriting, both": "#e6a817",
    "polynomials on the query side": "#0072b2",
    "polynomials on the key side": "#6cc0ee",
    "others": "#b07aa1",
}
# Two panels of training curves: the operators one has to choose from, and more and more readings of S.
CURVES = (
    ("softmax", "linear", "GatedDeltaNet", "hla2", "ahla", "hla3", "protecting"),
    ("softmax", "linear", "query 1", "query 2", "query 4", "query 8", "exact"),
)


@dataclass(frozen=True)
class Line:
    """One line of a ranking: an arm at the best point of its grid, with its runs there, lowest seed first."""

    entry: Entry
    lr: float
    runs: list[dict[str, Any]]

    @property
    def arm(self) -> str:
        return self.entry.arm

    def values(self, column: str) -> list[float]:
        return [float(run[column]) for run in self.runs]

    def mean(self, column: str) -> float:
        return statistics.fmean(self.values(column))

    def plateau(self) -> float:
        """Median steps until the loss fell under half of a guess among the values; infinite if it mostly did not."""
        return statistics.median(float(run["plateau_steps"] or math.inf) for run in self.runs)


def family(arm: str) -> str:
    """The colour group of an arm, from what it builds."""
    known = ARMS.get(arm)
    if known is None or known.parts:
        return "others"
    options = known.options
    if known.mixer in (mixers.Softmax, mixers.DeltaRule) or options.get("op") == "linear_attn":
        return "peers"
    if known.mixer is mixers.MomentPolynomial or options.get("op") == "hla_q":
        return "polynomials on the key side" if options.get("key") else "polynomials on the query side"
    if known.mixer is mixers.PublishedHLA3 or options.get("ridge") == 0.0:
        return "the paper's operators"
    return "protecting, overwriting, both" if "op" in options or known.mixer is mixers.OwnMoment else "others"


def ranking(
    rows: Iterable[dict[str, Any]], track: str, lrs: Sequence[float] = LRS, **sizes: int
) -> tuple[list[Line], dict[str, str]]:
    """The arms of a track, best mean test accuracy first, and why the other arms that have rows are not ranked.

    As in `plan.next_jobs` the best validation accuracy on the lowest seed chooses among an arm's learning rates and
    shapes. An arm is ranked as soon as its whole grid has rows; a run that failed has one, but is not chosen.
    """
    done = {row["key"]: row for row in rows if row["track"] == track}
    seeds = sorted({int(row["seed"]) for row in done.values()})
    grids: dict[str, list[tuple[Entry, float]]] = {}
    for entry in TRACKS[track]():
        grids.setdefault(entry.arm, []).extend((entry, lr) for lr in lrs)
    lines, left_out = [], {}
    for arm, grid in grids.items():
        runs = {seed: [done.get(entry.job(lr, seed, **sizes).key()) for entry, lr in grid] for seed in seeds}
        first = next((found for found in runs.values() if any(found)), None)
        if first is None:
            continue
        if not all(first):
            left_out[arm] = f"{sum(map(bool, first))} of {len(grid)} points of its grid have run"
            continue
        scores = [-1.0 if run is None or run["error"] else float(run["validation"]) for run in first]
        best = scores.index(max(scores))
        if scores[best] < 0:
            left_out[arm] = "every run of its grid failed"
            continue
        at_best = [found[best] for found in runs.values()]
        lines.append(Line(*grid[best], [run for run in at_best if run is not None and not run["error"]]))
    for row in done.values():
        if row["arm"] not in grids:
            left_out[row["arm"]] = "the plan does not have it"
    return sorted(lines, key=lambda line: -line.mean("test")), left_out


def table(header: Sequence[str], cells: Iterable[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A Markdown table; all columns to the right but those named in ``left``."""
    lines = [header, [":--" if name in left else "--:" for name in header], *cells]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def ranking_table(lines: Sequence[Line], track: str) -> str:
    shapes = track == "state"
    header = ["", "arm", "test", "min", "max", "seeds", *SETTINGS, "plateau", "state", *(["shape"] * shapes), "lr"]
    cells = []
    for place, line in enumerate(lines, 1):
        scores, plateau = line.values("test"), line.plateau()
        cells.append(
            [
                str(place),
                line.arm,
                *(percent(x) for x in (statistics.fmean(scores), min(scores), max(scores))),
                str(len(scores)),
                *(percent(line.mean(f"test_{setting}")) for setting in SETTINGS),
                "never" if math.isinf(plateau) else f"{plateau:.0f}",
                line.runs[0]["state_numbers"] or "grows",
                *([f"{line.entry.head_dim}/{line.entry.head_v_dim}"] * shapes),
                f"{line.lr:g}",
            ]
        )
    return table(header, cells, left=["arm"])


def text(rows: Sequence[dict[str, Any]], lrs: Sequence[float] = LRS, **sizes: int) -> str:
    """The whole report as Markdown; empty if no arm is complete in any track."""
    wanted = [row for row in rows if has_sizes(row, **sizes)]
    sections = []
    for track in TITLES:
        lines, left_out = ranking(wanted, track, lrs, **sizes)
        if not lines:
            continue
        sections.append(f"## {TITLES[track]}\n\n{ranking_table(lines, track)}")
        gains = [scores[0] - statistics.fmean(scores[1:]) for line in lines if len(scores := line.values("test")) > 1]
        if gains:
            sections.append(
                f"Where there are more seeds ({len(gains)} arms), the one that chose is on average "
                f"{percent(statistics.fmean(gains))} points better than the others: compare arms with one seed with "
                "each other, or with the maxima."
            )
        if left_out:
            sections.append("Not ranked: " + "; ".join(f"{arm} ({why})" for arm, why in left_out.items()) + ".")
    if not sections:
        return ""
    failed = [row for row in wanted if row["error"]]
    if failed:
        columns = ("track", "arm", "head_dim", "head_v_dim", "lr", "seed", "error")
        cells = [[row[name] for name in columns] for row in failed]
        sections.append("## Runs that failed\n\n" + table(columns, cells, left=("track", "arm", "error")))
    if infinite := sum(row["finite"] == "False" for row in wanted):
        sections.append(f"In {infinite} of the runs a training loss was not finite.")
    found = {name: ", ".join(sorted({row[name] for row in wanted})) for name in ("device", "torch", "commit", "date")}
    steps, tokens = (sizes.get(name, getattr(Job, name)) for name in ("steps", "tokens_per_step"))
    others = f"; {len(rows) - len(wanted)} rows of other sizes are left aside" if len(rows) > len(wanted) else ""
    head = (
        "# Associative recall with many mixers\n\n"
        f"{len(wanted)} runs of {steps} steps of {tokens} tokens on {found['device']}, torch {found['torch']}, "
        f"commit {found['commit']}, {found['date']}{others}.\n\n"
        "Accuracies in percent: the mean over the settings below and over the seeds, the worst and the best seed, and "
        f"the mean per setting, where `{SETTINGS[0]}` is {TRAINED[0][1]} pairs in {TRAINED[0][0]} tokens "
        f"({' and '.join(f'`{n}x{p}`' for n, p in LONGER)} are longer than trained). Plateau: median steps until the "
        "training loss fell under half of the loss of a guess among the values. State: numbers kept per layer, the "
        "short convolution's included. Validation accuracy on the lowest seed chose the learning rate"
        " (and in the second table the shape); this seed counts with the others, which flatters arms with one seed."
    )
    return "\n\n".join([head, *sections]) + "\n"


def has_sizes(row: dict[str, Any], **sizes: int) -> bool:
    """Whether a row is of the skeleton and the length of training that the ranking is about."""
    names = ("hidden_size", "layers", "steps", "tokens_per_step")
    return all(int(row[name]) == sizes.get(name, getattr(Job, name)) for name in names)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_bars(ax: Any, lines: Sequence[Line]) -> None:
    """Mean test accuracies as bars in the colours of the families, best on top, a dot per seed."""
    from matplotlib.patches import Patch

    label = lambda line: (  # noqa: E731
        f"{line.arm}  {line.entry.head_dim}/{line.entry.head_v_dim}" if line.entry.track == "state" else line.arm
    )
    places = range(len(lines))
    families = [family(line.arm) for line in lines]
    ax.barh(places, [line.mean("test") for line in lines], color=[FAMILIES[f] for f in families], height=0.72)
    for place, line in enumerate(lines):
        scores = line.values("test")
        ax.plot(
            scores,
            [place] * len(scores),
            "o",
            color="black",
            markersize=4,
            markeredgecolor="white",
            mew=0.6,
            clip_on=False,
        )
        ax.text(1.02, place, percent(line.mean("test")), va="center", ha="left", fontsize=8, clip_on=False)
    ax.set_yticks(places, [label(line) for line in lines], fontsize=9)
    ax.set(xlim=(0, 1), ylim=(len(lines) - 0.4, -0.6), xlabel="test accuracy (dots: seeds; right: mean in percent)")
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=color, label=name) for name, color in FAMILIES.items() if name in families]
    # Bars get shorter downwards: under many of them the lower right corner is free, else the space below the axis is.
    if len(lines) > 20:
        ax.legend(handles=handles, fontsize=9, loc="lower right")
    else:
        ax.legend(handles=handles, fontsize=9, loc="upper center", bbox_to_anchor=(0.4, -0.13), ncol=3, frameon=False)


def draw_settings(ax: Any, lines: Sequence[Line]) -> None:
    """Accuracy per length and number of pairs, a line per arm."""
    for i, line in enumerate(lines):
        means = [line.mean(f"test_{setting}") for setting in SETTINGS]
        ax.plot(means, color=f"C{i}", marker="osD^v<>P*X"[i % 10], markersize=5, linewidth=1.5, label=line.arm)
    labels = [f"{pairs} in\n{length}" for length, pairs in TRAINED + LONGER]
    ax.set_xticks(range(len(labels)), labels)
    ax.axvspan(len(TRAINED) - 0.5, len(labels) - 0.5, color="black", alpha=0.05)
    ax.text(len(labels) - 0.55, 1.0, "longer than trained", ha="right", va="center", fontsize=9)
    ax.set(xlim=(-0.3, len(labels) - 0.5), ylim=(0, 1.04), xlabel="pairs in tokens", ylabel="test accuracy")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9, loc="lower left")


def draw_curves(ax: Any, lines: Sequence[Line], arms: Sequence[str], steps: int) -> None:
    """Training losses of the lowest seed at the chosen points."""
    by_name = {line.arm: line for line in lines}
    blues = iter(("#a6cee3", "#6baed6", "#2f7fbd", "#08306b"))
    fixed = {"softmax": "black", "linear": "#8c8c8c", "exact": "#d62728"}
    others = iter(("#2ca02c", "#d55e00", "#e6a817", "#8c510a", "#0072b2"))
    for arm in arms:
        color = fixed.get(arm) or next(blues if arm.startswith("query") else others)
        if (line := by_name.get(arm)) is None:
            continue
        losses = [float(x) for x in line.runs[0]["curve"].split()]
        width = max(1, steps // CURVE)
        middles = [(i + 0.5) * width for i in range(len(losses))]
        style = "--" if arm in ("softmax", "exact") else "-"
        ax.plot(middles, losses, style, color=color, linewidth=1.7, label=f"{arm} (lr {line.lr:g})")
    chance = Recall().chance_loss()
    ax.axhline(chance, color="black", linewidth=0.8, linestyle=":")
    ax.text(steps, chance, "a guess among the values", ha="right", va="bottom", fontsize=8)
    ax.set(xlim=(0, steps), ylim=(0, 9.2), xlabel="step")
    ax.grid(alpha=0.3)


def draw(rows: Sequence[dict[str, Any]], folder: Path, lrs: Sequence[float] = LRS, **sizes: int) -> list[Path]:
    """Writes the figures of the tracks that have complete arms; returns their paths."""
    plt = pyplot()
    wanted = [row for row in rows if has_sizes(row, **sizes)]
    written = []

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        plt.close(figure)
        written.append(folder / name)

    folder.mkdir(parents=True, exist_ok=True)
    width, state = (ranking(wanted, track, lrs, **sizes)[0] for track in ("width", "state"))
    if width:
        figure, ax = plt.subplots(figsize=(9, 1.3 + 0.2 * len(width)))
        draw_bars(ax, width)
        ax.set_title("Associative recall at equal width", fontsize=12)
        save(figure, "quality_width.png")

        steps = sizes.get("steps", Job.steps)
        figure, axes = plt.subplots(1, 2, figsize=(12, 5.6), sharey=True)
        for ax, arms, title in zip(axes, CURVES, ("Operators", "More readings of S"), strict=True):
            draw_curves(ax, width, arms, steps)
            ax.set_title(title, fontsize=12)
            ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3, frameon=False)
        axes[0].set_ylabel("training loss")
        figure.tight_layout()
        save(figure, "quality_curves.png")
    if state:
        figure, axes = plt.subplots(1, 2, figsize=(14, 5))
        draw_bars(axes[0], state)
        axes[0].set_title("Associative recall at equal state (shapes: width of k / v)", fontsize=12)
        draw_settings(axes[1], state)
        axes[1].set_title("The same by length and number of pairs", fontsize=12)
        figure.tight_layout()
        save(figure, "quality_state.png")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.report", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "quality_mqar.csv")
    parser.add_argument("--out", type=Path, help="folder of the table and the figures (default: the CSV's)")
    parser.add_argument("--lrs", nargs="+", type=float, default=LRS)
    parser.add_argument("--steps", type=int, default=Job.steps)
    parser.add_argument("--tokens-per-step", type=int, default=Job.tokens_per_step)
    args = parser.parse_args()
    if not args.csv.exists():
        parser.error(f"{args.csv} does not exist; python -m benchmarks.quality writes it")
    rows = read_rows(args.csv)
    sizes = {"steps": args.steps, "tokens_per_step": args.tokens_per_step}
    report = text(rows, args.lrs, **sizes)
    if not report:
        failed = sum(bool(row["error"]) for row in rows)
        parser.error(
            f"no arm in {args.csv} has its whole grid ({len(rows)} rows, {failed} failed; learning rates "
            f"{', '.join(f'{lr:g}' for lr in args.lrs)}, {args.steps} steps of {args.tokens_per_step} tokens)"
        )
    folder = args.out or args.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    print(report)
    path = folder / args.csv.with_suffix(".md").name
    path.write_text(report, encoding="utf-8")
    figures = draw(rows, folder, args.lrs, **sizes)
    say("wrote " + ", ".join(str(p) for p in (path, *figures)))


if __name__ == "__main__":
    main()
