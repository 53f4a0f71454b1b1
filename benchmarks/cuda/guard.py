"""Bounds of a run: what fails becomes a message in its row, and what no longer fits the time is left out."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import torch


class Budget:
    """Seconds that a run may take; nothing new starts once they are spent."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def guarded(function: Callable[..., Any], *args: Any, budget: Budget | None = None) -> tuple[Any, str]:
    """(result of a call, ""), or (None, why there is none)."""
    if budget is not None and budget.left <= 0:
        return None, "left out: time budget spent"
    try:
        return function(*args), ""
    except Exception as error:  # of any kind: a peer that fails must not end the run
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]
    free()  # now that the error holds no tensors any more
    return None, message


def free() -> None:
    """Gives unused memory of the GPU back."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # after an error of the device that lasts, every call raises it
            torch.cuda.empty_cache()
