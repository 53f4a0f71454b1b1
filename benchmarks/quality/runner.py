"""Workers that train side by side, and the CSV that keeps what they found."""

from __future__ import annotations

import csv
import os
import queue
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.measure import environment
from benchmarks.quality.tasks import LONGER, TRAINED, Batch, Recall
from benchmarks.quality.training import Job, run

RESULTS = Path(__file__).parents[1] / "results" / "quality_mqar.csv"
COLUMNS = [
    *("task", "track", "arm", "options", "heads", "head_dim", "head_v_dim", "hidden_size", "layers"),
    *("lr", "seed", "steps", "tokens_per_step", "parameters", "mixer_parameters", "state_numbers"),
    *("validation", "test", *(f"test_{n}x{p}" for n, p in TRAINED + LONGER)),
    *(
        "finite",
        "plateau_steps",
        "seconds",
        "error",
        "device",
        "threads",
        "torch",
        "python",
        "hla",
        "commit",
        "date",
        "curve",
    ),
]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file with their ``key``; a line cut off by a kill does not count."""
    if not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values() or None in row:
                continue
            job = Job(
                row["track"], row["arm"], float(row["lr"]), int(row["seed"]),
                *(int(row[name]) for name in ("heads", "head_dim", "head_v_dim", "hidden_size", "layers")),
                int(row["steps"]), int(row["tokens_per_step"]),
            )  # fmt: skip
            rows.append({**row, "key": job.key()})
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new and not path.read_bytes().endswith(b"\n"):
        with open(path, "a") as file:
            file.write("\n")  # ends a line that a kill cut off
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def work(device: str, jobs: Any, results: Any) -> None:
    """A worker: takes jobs until it is sent None."""
    torch.set_num_threads(1)
    data: dict[tuple[int, int, int], tuple[list[int], list[Batch]]] = {}
    while (job := jobs.get()) is not None:
        try:
            task = Recall(job.tokens_per_step)
            key = (job.seed, job.steps, job.tokens_per_step)
            if key not in data:
                schedule = task.schedule(job.steps, job.seed)
                generator = torch.Generator(device).manual_seed(job.seed)
                data[key] = schedule, [task.batch(kind, generator) for kind in schedule]
            schedule, batches = data[key]
            row = run(job, batches.__getitem__, schedule, task, device)
        except Exception as error:  # the row says what went wrong; other runs go on
            traceback.print_exc()
            row = {**vars(job), "task": Recall.name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        results.put((job, {**row, **environment(device)}))


class Workers:
    """A fixed number of processes; `put` a job, `get` a finished one with its row."""

    def __init__(self, count: int, device: str):
        context = mp.get_context("spawn")
        self.count, self.jobs, self.results = count, context.Queue(), context.Queue()
        self.processes = [
            context.Process(target=work, args=(device, self.jobs, self.results), daemon=True) for _ in range(count)
        ]
        for process in self.processes:
            process.start()

    def put(self, job: Job) -> None:
        self.jobs.put(job)

    def get(self) -> tuple[Job, dict[str, Any]]:
        while True:
            try:
                return self.results.get(timeout=5)
            except queue.Empty:
                dead = [p.exitcode for p in self.processes if p.exitcode is not None]
                if dead:
                    raise RuntimeError(f"a worker ended with exit code {dead[0]}; its run has no row") from None

    def close(self) -> None:
        for _ in self.processes:
            self.jobs.put(None)
        for process in self.processes:
            process.join(timeout=10)
