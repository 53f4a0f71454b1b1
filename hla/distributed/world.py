"""The processes of a training run, one or several ranks: what they agree on, and which one is lost."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from hla.errors import HLAError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for one collective: longer than the first rank takes to save a model
LOOK_EVERY = 0.5  # seconds between two looks at the other ranks
PATIENCE = 5.0  # seconds in which a rank whose collective failed waits for the name of the lost one
FAILURES = (HLAError, OSError, SafetensorError, CheckpointException)  # what a rank tells the others


class World:
    """One process, which agrees with itself. :class:`Ranks` are several, with the same methods.

    Every rank calls the same methods in the same order, and what they return is the same on every rank.
    """

    rank, size = 0, 1

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on the first rank, which alone does it; an error there is one of all ranks."""
        return work()

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on this rank; all ranks do it, and an error on any is one of all ranks."""
        return work()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        return [value]

    def same(self, number: float) -> float:
        """The number of the first rank."""
        return number

    def highest(self, number: float) -> float:
        """The largest number of any rank."""
        return number

    def common(self, error: HLAError) -> HLAError:
        """Mark an error that all ranks have: the first one tells it."""
        return error


class Ranks(World):
    """The ranks of the default process group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def first(self, work: Callable[[], T]) -> T:
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told = [work(), None]
            except (HLAError, OSError) as error:
                told = [None, error]
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise self._mark(told[1])
        return told[0]

    def together(self, work: Callable[[], T]) -> T:
        error: BaseException | None = None
        try:
            result = work()
        except FAILURES as caught:
            error = caught
        told = self.gather(None if error is None else str(error))
        if error is not None:
            raise self._mark(error)
        for rank, sentence in enumerate(told):
            if sentence is not None:
                raise self._mark(HLAError(f"rank {rank}: {sentence}"))
        return result

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def same(self, number: float) -> float:
        return self.highest(number if self.rank == 0 else -float("inf"))

    def highest(self, number: float) -> float:
        found = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def common(self, error: HLAError) -> HLAError:
        self._mark(error)
        return error

    def _mark(self, error: BaseException) -> BaseException:
        setattr(error, "told_by", "RANK")  # noqa: B010 (exceptions declare no such name)
        return error


@contextmanager
def before_meeting() -> Iterator[None]:
    """What fails in here fails on every rank, or on all of one machine (a file that it lacks)."""
    try:
        yield
    except HLAError as error:
        setattr(error, "told_by", "LOCAL_RANK")  # noqa: B010
        raise


def told_by(error: BaseException | None) -> str | None:
    """The variable that is 0 where an error is told that several ranks have; None for an error of this rank alone."""
    while error is not None:
        if hasattr(error, "told_by"):
            return error.told_by
        error = error.__cause__
    return None


def tells(error: BaseException) -> bool:
    """Whether this process is the one to tell the user of an error."""
    variable = "RANK" if isinstance(error, KeyboardInterrupt) else told_by(error)
    return variable is None or os.environ.get(variable, "0") == "0"


def ranks_started() -> int:
    """How many processes torchrun (or something like it) has started, this one among them; 1 if it was not there."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def meet(device: torch.device) -> Iterator[World]:
    """The world of this process, until the end of the context: the ranks of a process group, or this one alone.

    A process group that there is already is used (it must have a backend for the CPU, too); otherwise torchrun's
    variables say whether there is one to make (gloo, and NCCL for a GPU), and then a thread watches the other ranks and
    ends this process if one of them is lost.
    """
    if ranks_started() == 1:
        yield World()
        return
    if dist.is_initialized():
        yield Ranks()
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except (ValueError, RuntimeError) as error:
        raise HLAError(f"the ranks cannot meet: {str(error).splitlines()[0]}") from error
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # agreements and checkpoints go over the CPU
        # Of collectives in CUDA graphs NCCL would register the memory, which it takes for one piece: with
        # expandable_segments it is not, and the ranks would wait for each other for ever.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # torchrun keeps the store when it restarts the ranks: nobody may read what is left of an earlier attempt.
    attempt = f"hla/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    dist.init_process_group(
        backend, store=dist.PrefixStore(attempt, store), rank=rank, world_size=size, timeout=TIMEOUT
    )
    # With a connection of its own: on the other one this process may be waiting for whoever is lost.
    watch = Watch(dist.PrefixStore(f"{attempt}/watch", store.clone()), rank, size)
    watch.start()
    try:
        yield Ranks()
    except BaseException as error:
        if told_by(error):
            watch.leave()
        elif isinstance(error, Exception):  # alone: perhaps because another rank is lost, which is then told instead
            watch.over.wait(PATIENCE)
        raise
    else:
        watch.leave()
        dist.destroy_process_group()


class Watch(threading.Thread):
    """Looks whether the processes of the other ranks on this machine are alive, and ends this one if one is not.

    A collective that waits for a lost rank cannot be relied on to end soon or to say which rank it waits for. Ranks on
    other machines are watched by those beside them, who leave a note in the store. Which processes can be seen is found
    out at the start (containers on one machine may not see each other's).
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(name="hla-watch", daemon=True)
        self.rank = rank
        self.store = store
        self.over = threading.Event()
        store.set(f"process/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
        processes = [json.loads(store.get(f"process/{other}")) for other in range(size)]
        here = processes[rank][0]
        self.others = {
            other: process
            for other, (host, process) in enumerate(processes)
            if other != rank and host == here and sys.platform != "win32" and _alive(process)
        }

    def run(self) -> None:
        while not self.over.wait(LOOK_EVERY):
            try:
                for rank, process in self.others.items():
                    if not _alive(process) and not self.store.check([f"left/{rank}"]):
                        self.end(rank)
                if self.store.check(["lost"]):
                    os._exit(1)  # whoever left that note has told it
            except (RuntimeError, ValueError):  # of the store, which is where rank 0 or its torchrun is
                if not self.over.is_set():
                    self.tell("torchrun, or the machine of rank 0, was lost")

    def end(self, lost: int) -> None:
        note = f"{lost}, noticed by {self.rank}"
        if self.store.compare_set("lost", "", note) == note.encode():
            self.tell(f"rank {lost} was lost: its process has ended")
        os._exit(1)

    def tell(self, sentence: str) -> None:
        os.write(2, f"hla: {sentence}; all ranks end. --resume goes on from the last checkpoint.\n".encode())
        os._exit(1)

    def leave(self) -> None:
        """Stop looking, and have the others not miss this rank."""
        self.over.set()
        with suppress(RuntimeError, ValueError):
            self.store.set(f"left/{self.rank}", "")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
