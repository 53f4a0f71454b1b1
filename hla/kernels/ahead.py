"""Compiles what an operator launches, forward and backward, at once and in threads, when the first of it is missing.

A kernel is compiled at its first launch, in a process that has not met it, and takes up to seconds. One by one that is
as long as all of them together. So when a launch finds its kernel missing, the operator it belongs to is rehearsed: its
forward and backward pass run once with tensors that have no memory, and their launches are only noted (`launch`).
What was noted is compiled in threads, while the operator itself goes on and waits for each kernel when it needs it.

That changes when kernels are compiled, and nothing else. A kernel whose arguments differ from what the rehearsal took
for granted (inputs aligned to 16 bytes; which final states will have gradients) is compiled when it is met, as any
other. A process that ends first waits for kernels that are being compiled.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

THREADS = 8  # at most, for an operator


class Running(NamedTuple):
    """A call of an `Operation`. needed: of which tensors a backward pass wants gradients, None: there will be none."""

    operation: Any
    plan: str
    tensors: Sequence[Tensor | None]
    needed: Sequence[bool] | None


class _Local(threading.local):
    expected: Running | None = None  # the operator that is running, unless it has been rehearsed
    notes: dict[Any, Callable[[], object]] | None = None  # in a rehearsal: by key, what compiles a kernel
    device: torch.device | None = None  # in a rehearsal: the one that tensors on "meta" stand for


local = _Local()
_coming: dict[Any, Future] = {}


def real(device: torch.device) -> torch.device:
    """The device whose kernels are wanted: another one in a rehearsal."""
    return local.device if device.type == "meta" and local.device is not None else device


class expecting:
    """Inside, a launch that finds its kernel missing has all of an operator compiled; arguments as for `Running`.

    (A class, as it is entered at every call.)
    """

    __slots__ = ("before", "call")

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __enter__(self) -> None:
        self.before, local.expected = local.expected, Running(*self.call)

    def __exit__(self, *_: object) -> None:
        local.expected = self.before


def wait_for(key: Any) -> None:
    """Has the operator that is running rehearsed, and waits until the kernel of this key is compiled, if it will be.

    Where that fails the launch, which does it again, says why.
    """
    if local.expected is not None:
        call, local.expected = local.expected, None
        if torch.version.hip is None:  # (whose compiler has not been seen in threads)
            _rehearse(call)
    coming = _coming.get(key)
    if coming is None:
        return
    try:
        with suppress(CancelledError):
            coming.exception()
    except BaseException:  # Ctrl-C: the threads would be waited for at the end of the process
        for other in _coming.values():
            other.cancel()
        raise
    _coming.pop(key, None)


def _rehearse(call: Running) -> None:
    operation, plan, tensors, needed = call
    there = [x for x in tensors if x is not None]
    local.device, local.notes = there[0].device, {}
    try:
        with torch.no_grad(), _disable_current_modes():
            like = [None if x is None else _without_memory(x) for x in tensors]
            results, kept = operation.forward(plan, *like, keep=needed is not None)
            if needed is not None:
                first = operation.first_saved(plan)
                grads = [torch.empty_like(x) if i < first else None for i, x in enumerate(results)]
                operation.backward(plan, like, [*results[first:], *kept], grads, needed)
        notes = local.notes
    except Exception as error:
        message = f"kernels will be compiled one after another, as they could not be foreseen: {error}"
        warnings.warn(message, stacklevel=2)
        return
    finally:
        local.device = local.notes = None
    threads = ThreadPoolExecutor(_threads(), "hla-compile")
    with suppress(RuntimeError):  # no more threads, or the end of the process: each launch compiles its kernel
        for key, compile_ in notes.items():
            if key not in _coming:
                _coming[key] = threads.submit(compile_)
    threads.shutdown(wait=False)


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
