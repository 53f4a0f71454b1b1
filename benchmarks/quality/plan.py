"""What to run next: tracks of arms and shapes, the grid of learning rates on one seed, then more seeds of the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.quality.arms import ARMS
from benchmarks.quality.training import Entry, Job

LRS = (3e-3, 1e-2)
SEEDS = (0, 1, 2)


def width_track() -> list[Entry]:
    """All arms at equal width of q, k and v: equal parameters (within a hundredth), different states."""
    return [Entry("width", name, *((2, 16, 16) if arm.parts else (1, 32, 32))) for name, arm in ARMS.items()]


def state_track() -> list[Entry]:
    """Chosen arms in three shapes each, all with about the same numbers of state, convolution included."""
    return [Entry("state", arm, 1, k, v) for arm, shapes in EQUAL_STATE.items() for k, v in shapes]


ONE_STATE = ((24, 43), (32, 32), (40, 24))  # P: 1305, 1312, 1272 numbers
TWO_WIDE_STATES = ((16, 34), (24, 23), (32, 16))  # P and E: 1286, 1317, 1264 numbers
TWO_STATE = ((16, 56), (24, 32), (32, 16))  # S and P (or F): 1296, 1308, 1280
EQUAL_STATE = {
    "GatedDeltaNet": ONE_STATE,
    "query 4, per token, gate": TWO_STATE,
    "DeltaNet, identity": ONE_STATE,
    "query 4, per token": TWO_STATE,
    "query 2, per token, gate": TWO_STATE,
    "linear": ONE_STATE,
    "overwriting": TWO_WIDE_STATES,
    "GatedDeltaNet, identity": ONE_STATE,
    "query 4, token nodes": TWO_STATE,
    "query 4, token ridge": TWO_STATE,
    "query 4, gate": TWO_STATE,
    "hla_q, gate": TWO_STATE,
}


def text_track() -> list[Entry]:
    """Language models of about 4M parameters."""
    return [Entry("text", arm, 4, 64, 64, 256, 4, "text") for arm in TEXT_ARMS]


TEXT_ARMS = (
    *("softmax, RoPE", "hla_q", "GatedDeltaNet", "hla_q, gate", "linear", "protecting", "hla_q, token nodes, gate"),
    *("DeltaNet", "linear, gate", "both", "hla_q 2", "hla2"),
)
TRACKS = {"width": width_track, "state": state_track, "text": text_track}


def next_jobs(
    entries: Sequence[Entry], rows: Iterable[dict[str, Any]], lrs: Sequence[float], seeds: Sequence[int], **sizes: int
) -> Iterator[Job]:
    """Jobs without a row, most deciding first: every arm's grid on the first seed, then more of its best."""
    done = {row["key"]: row for row in rows}
    grids: dict[str, list[tuple[Entry, float]]] = {}
    for entry in entries:
        grids.setdefault(entry.arm, []).extend((entry, lr) for lr in lrs)
    first = {arm: [entry.job(lr, seeds[0], **sizes) for entry, lr in grid] for arm, grid in grids.items()}
    for jobs in first.values():
        yield from (job for job in jobs if job.key() not in done)
    for arm, jobs in first.items():
        if all(job.key() in done for job in jobs):
            scores = [float(done[job.key()]["validation"] or 0.0) for job in jobs]
            entry, lr = grids[arm][scores.index(max(scores))]
            yield from (job for job in (entry.job(lr, s, **sizes) for s in seeds[1:]) if job.key() not in done)
