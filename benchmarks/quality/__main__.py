"""Runs the comparison, several models at once on one GPU, and appends one row per finished run to a CSV.

Resumable: runs that have a row are not repeated. Example, nine minutes of the ranking at equal width on a GPU:

    python -m benchmarks.quality --track width --workers 4 --minutes 9
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.measure import say
from benchmarks.quality.plan import LRS, SEEDS, TRACKS, next_jobs
from benchmarks.quality.runner import RESULTS, Workers, append_row, columns, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--track", choices=TRACKS, default="width")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, in this order (default: all)")
    parser.add_argument("--lrs", nargs="+", type=float, default=LRS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="the first one chooses the learning rate")
    parser.add_argument("--steps", type=int, help="default: 3000, text: 1500")
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, help="start no run that would not end in time")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/quality_TASK.csv")
    args = parser.parse_args()
    entries = TRACKS[args.track]()
    if args.arms:
        unknown = [a for a in args.arms if a not in {e.arm for e in entries}]
        if unknown:
            parser.error(
                f"track {args.track} has no arm {unknown[0]!r}; it has: {', '.join({e.arm: 0 for e in entries})}"
            )
        entries = [e for a in args.arms for e in entries if e.arm == a]
    task = entries[0].task
    args.out = args.out or RESULTS / f"quality_{task}.csv"
    args.steps = args.steps or {"mqar": 3000, "text": 1500}[task]
    sizes = {"steps": args.steps, "tokens_per_step": args.tokens_per_step}
    deadline = time.perf_counter() + 60 * args.minutes if args.minutes else float("inf")

    workers = Workers(args.workers, args.device)
    running: dict[str, float] = {}
    rows, durations = read_rows(args.out), [0.0]
    begun = time.perf_counter()
    while True:
        now = time.perf_counter()
        room = deadline - now > 1.3 * statistics.median(durations)
        waiting = (j for j in next_jobs(entries, rows, args.lrs, args.seeds, **sizes) if j.key() not in running)
        while room and len(running) < args.workers and (job := next(waiting, None)) is not None:
            running[job.key()] = now
            workers.put(job)
        if not running:
            break
        job, row = workers.get()
        durations.append(time.perf_counter() - running.pop(job.key()))
        append_row(args.out, row)
        rows.append({**{name: str(row.get(name, "")) for name in columns(task)}, "key": job.key()})
        say(
            f"{time.perf_counter() - begun:6.1f} s  {job.arm:30s} {job.head_dim}/{job.head_v_dim} lr {job.lr:g} "
            f"seed {job.seed}: validation {row.get('validation')} test {row.get('test')} "
            f"in {row.get('seconds')} s {row.get('error', '')}"
        )
    workers.close()
    say(f"{len(rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
