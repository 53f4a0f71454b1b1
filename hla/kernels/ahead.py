"""Compiles what an operator launches, forward and backward, at once and in threads, when the first of it is missing.

A kernel is compiled at its first launch, in a process that has not met it, and takes up to seconds. One by one that is
as long as all of them together. So when a launch finds its kernel missing, the operator it belongs to is rehearsed: its
forward and backward pass run once with tensors that have no memory, and their launches are only noted (`launch`).
What was noted is compiled in threads, while the operator itself goes on and waits for each kernel when it needs it.

That changes when kernels are compiled, and nothing else. A kernel whose arguments differ from what the rehearsal took
for granted (tensors aligned to 16 bytes, no gradients of final states) is compiled when it is met, as any other.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

THREADS = 8  # at most


class _Local(threading.local):
    expected: Callable[[], None] | None = None  # rehearses the operator that is running, unless it has been
    notes: dict[Any, Callable[[], object]] | None = None  # in a rehearsal: by key, what compiles a kernel
    device: torch.device | None = None  # in a rehearsal: the one that tensors on "meta" stand for


local = _Local()
_coming: dict[Any, Future] = {}


def real(device: torch.device) -> torch.device:
    """The device whose kernels are wanted: another one in a rehearsal."""
    return local.device if device.type == "meta" and local.device is not None else device


@contextlib.contextmanager
def expecting(operation: Any, plan: str, tensors: Sequence[Tensor | None], needed: Sequence[bool] | None) -> Iterator:
    """Inside, a launch that finds its kernel missing has all of an `Operation` compiled.

    Args:
        needed: of which tensors a backward pass will want gradients; None: there will be none.
    """

    def rehearse() -> None:
        local.expected = None
        _rehearse(operation, plan, tensors, needed)

    before, local.expected = local.expected, rehearse
    try:
        yield
    finally:
        local.expected = before


def wait_for(key: Any) -> None:
    """Has the operator that is running rehearsed, and waits until the kernel of this key is compiled, if it will be.

    Where that fails the launch, which does it again, says why.
    """
    if local.expected is not None:
        local.expected()
    coming = _coming.pop(key, None)
    if coming is not None:
        coming.exception()


def _rehearse(operation: Any, plan: str, tensors: Sequence[Tensor | None], needed: Sequence[bool] | None) -> None:
    there = [x for x in tensors if x is not None]
    local.device, local.notes = there[0].device, {}
    try:
        with torch.no_grad():
            like = [None if x is None else _without_memory(x) for x in tensors]
            results, kept = operation.forward(plan, *like, keep=needed is not None)
            if needed is not None:
                first = operation.first_saved(plan)
                grads = [torch.empty_like(x) if i < first else None for i, x in enumerate(results)]
                operation.backward(plan, like, [*results[first:], *kept], grads, needed)
        notes = local.notes
    except Exception as error:
        warnings.warn(
            f"kernels will be compiled one after another, as they could not be foreseen: {error}", stacklevel=2
        )
        return
    finally:
        local.device = local.notes = None
    if len(notes) > 1:
        threads = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "hla-compile")
        _coming.update((key, threads.submit(compile_)) for key, compile_ in notes.items() if key not in _coming)
        threads.shutdown(wait=False)


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
