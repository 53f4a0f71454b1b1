"""Workers that train side by side, and the CSV that keeps what they found."""

from __future__ import annotations

import csv
import io
import os
import queue
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.measure import environment
from benchmarks.quality.tasks import Batch
from benchmarks.quality.training import TASKS, Job, run

RESULTS = Path(__file__).parents[1] / "results"


def columns(task: str) -> list[str]:
    """The columns of a task's results."""
    return [
        *("task", "track", "arm", "options", "heads", "head_dim", "head_v_dim", "hidden_size", "layers"),
        *("lr", "seed", "steps", "tokens_per_step", "parameters", "mixer_parameters", "state_numbers"),
        *TASKS[task].columns,
        *("finite", "plateau_steps", "seconds", "error"),
        *("device", "threads", "torch", "python", "hla", "commit", "date", "curve"),
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file with their ``key``; a line cut off by a kill does not count."""
    if not path.exists():
        return []
    rows = []
    content = path.read_bytes()
    for row in csv.DictReader(io.StringIO(content[: whole_lines(content)].decode(), newline="")):
        if None in row.values() or None in row:
            continue
        kinds = {field.name: type(field.default) for field in fields(Job)} | {"lr": float, "seed": int}
        known = {name: kind(row[name]) for name, kind in kinds.items() if kind in (int, float)}
        job = Job(track=row["track"], arm=row["arm"], task=row["task"], **known)
        rows.append({**row, "key": job.key()})
    return rows


def whole_lines(content: bytes) -> int:
    """The length of a file without a last line that a kill cut off, however much of it there is."""
    return content.rfind(b"\n") + 1


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    length = whole_lines(path.read_bytes()) if path.exists() else 0
    with open(path, "a", newline="") as file:
        file.truncate(length)  # half a line, perhaps within quotes, would take the next one with it
        writer = csv.DictWriter(file, columns(row["task"]), restval="", lineterminator="\n")
        if not length:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def work(device: str, jobs: Any, results: Any) -> None:
    """A worker: takes jobs until it is sent None."""
    torch.set_num_threads(1)
    data: dict[Any, tuple[list[int], list[Batch]]] = {}
    while (job := jobs.get()) is not None:
        try:
            task = TASKS[job.task](job.tokens_per_step)
            torch.set_float32_matmul_precision(task.precision)
            key = (job.task, job.seed, job.steps, job.tokens_per_step)
            if key not in data:
                schedule = task.schedule(job.steps, job.seed)
                generator = torch.Generator(device).manual_seed(job.seed)
                data[key] = schedule, [task.batch(kind, generator) for kind in schedule]
            schedule, batches = data[key]
            row = run(job, batches.__getitem__, schedule, task, device)
        except Exception as error:  # the row says what went wrong; other runs go on
            traceback.print_exc()
            row = {**vars(job), "error": f"{type(error).__name__}: {error}".splitlines()[0]}
        results.put((job, {**row, **environment(device)}))


class Workers:
    """A fixed number of processes; `put` a job, `get` a finished one with its row."""

    def __init__(self, count: int, device: str):
        context = mp.get_context("spawn")
        self.jobs, self.results = context.Queue(), context.Queue()
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
