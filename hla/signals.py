"""Ctrl-C and its like as something to notice between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(patient: bool = False) -> Iterator[Callable[[], signal.Signals | None]]:
    """Take note of the first SIGINT or SIGTERM instead of ending at once; a second one ends as usual.

    Args:
        patient: further ones do nothing, from the first one until the process ends: for a rank, which gets Ctrl-C from
            the terminal and again from torchrun (and is killed if it then takes too long).

    Yields a function that returns the signal, or None.
    """
    caught: list[signal.Signals] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in handled}

    def restore() -> None:
        for number in handled:
            signal.signal(number, before[number])

    def note(number: int, frame: object) -> None:
        caught.append(signal.Signals(number))
        if not patient:
            restore()

    for number in handled:
        signal.signal(number, note)
    try:
        yield lambda: caught[0] if caught else None
    finally:
        if not (patient and caught):
            restore()
