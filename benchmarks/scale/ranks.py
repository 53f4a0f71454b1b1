"""What measurements on several ranks share: one clock, one memory, one decision, and a way to leave collectives out."""

from __future__ import annotations

import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cuda.guard import guarded
from benchmarks.measure import say, write_csv
from hla.distributed import exchange

TIMEOUT = timedelta(seconds=90)  # of a collective: longer than rank 0 takes alone; a rank that is lost ends the run


class Ranks:
    """The processes that torchrun started, one per GPU (or some on a CPU)."""

    def __init__(self, device: str):
        os.environ["NCCL_NVLS_ENABLE"] = "0"  # before NCCL starts: no NVLink multicast, which not every host allows
        self.kind, self.device = device, torch.device("cpu")
        if device == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def say(self, message: str) -> None:
        if self.rank == 0:
            say(message)

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def meet(self) -> None:
        """Every rank has done all its work."""
        self.largest([0.0])
        self.synchronize()

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Of every number the largest of all ranks."""
        x = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    def first(self, number: float) -> float:
        """The number of rank 0."""
        return self.largest([number if self.rank == 0 else -math.inf])[0]

    def attempt(self, function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
        """`guarded` on every rank: if it fails on one there is no result on any, and why is the same text."""
        result, error = guarded(function, *args)
        if self.largest([float(bool(error))])[0]:
            told: list[Any] = [None] * self.size
            dist.all_gather_object(told, error)
            return None, next(f"rank {rank}: {x}" for rank, x in enumerate(told) if x)
        return result, ""

    def time(self, functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Median milliseconds of functions that take turns.

        All ranks begin every call together, and the slowest one's time counts.
        """
        times = {name: self.largest(x) for name, x in in_turns(functions, self, seconds, self.meet).items()}
        return {name: 1e3 * statistics.median(x) for name, x in times.items()}

    def memory(self, function: Callable[[], object]) -> float | None:
        """Largest GiB in use during a call, on the rank that has the most; None on a CPU."""
        peak = peak_gib(function, self.kind)
        return None if peak is None else self.largest([peak])[0]


def in_turns(
    functions: dict[str, Callable[[], object]], ranks: Ranks, seconds: float, before: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Seconds of calls: after a warm-up three to thirty of each function, as ``seconds`` (for each) allow.

    Args:
        before: called before each, and then all ranks make the same number of calls; without it this rank is alone.
    """

    def once() -> dict[str, float]:
        times = {}
        for name, function in functions.items():
            (before or ranks.synchronize)()
            start = time.perf_counter()
            function()
            ranks.synchronize()
            times[name] = time.perf_counter() - start
        return times

    once()
    found = [once()]
    slowest = max(found[0].values())
    if before is not None:
        (slowest,) = ranks.largest([slowest])
    found += [once() for _ in range(min(29, max(2, int(seconds / slowest) - 1)))]
    return {name: [times[name] for times in found] for name in functions}


def peak_gib(function: Callable[[], object], kind: str) -> float | None:
    """Largest GiB in use during a call, everything included; None on a CPU."""
    if kind != "cuda":
        function()
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


class Exchanges:
    """The collectives of sequence parallelism; with ``real`` False they copy what this rank tells itself.

    That leaves all of the work and no waiting. Nothing but the switch changes between two calls that are compared.
    """

    real = True

    @contextmanager
    def switched(self) -> Iterator[Exchanges]:
        gather, scatter = exchange.all_gather, dist.all_to_all_single

        def all_gather(output: Tensor, message: Tensor, **options: Any) -> Any:
            if self.real:
                return gather(output, message, **options)
            output.view(-1, message.numel()).copy_(message)
            return self

        def all_to_all(output: Tensor, rows: Tensor, **options: Any) -> Any:
            if self.real:
                return scatter(output, rows, **options)
            output.copy_(rows)
            return self

        with (
            mock.patch.object(exchange, "all_gather", all_gather),
            mock.patch.object(dist, "all_to_all_single", all_to_all),
        ):
            yield self

    def wait(self) -> None:
        """Of a copy, which the stream orders."""


class Table:
    """Rows of a CSV, which rank 0 writes after each; those that the file has stay, but for what is measured again.

    Args:
        where: columns of every row.
        key: the columns that say what a row measures, beside the number of GPUs.
    """

    def __init__(self, path: Path, ranks: Ranks, where: dict[str, Any], key: Sequence[str]):
        self.path, self.ranks, self.where, self.key = path, ranks, where, ("gpus", *key)
        self.rows: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        if path.exists():
            with open(path, newline="") as file:
                self.others = list(csv.DictReader(file))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({"gpus": self.ranks.size, **row, **self.where})
        if self.ranks.rank == 0:
            new = self._what(self.rows[-1])
            self.others = [other for other in self.others if self._what(other) != new]
            others = [{name: other.get(name, "") for name in self.rows[0]} for other in self.others]
            write_csv(self.path, [*others, *self.rows])
            say("  " + ", ".join(f"{name} {x}" for name, x in row.items() if x != ""))

    def _what(self, row: dict[str, Any]) -> list[str]:
        return [str(row.get(name, "")) for name in self.key]


def print_table(path: Path) -> None:
    """The columns of a CSV up to ``error``, in Markdown, without those that are empty in all rows."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])
    names = [name for name in names[: names.index("error") + 1] if any(row[name] for row in rows)]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(row[name] for name in names) + " |")


def rounded(x: float | None, digits: int = 3) -> float | str:
    return "" if x is None else round(x, digits)
