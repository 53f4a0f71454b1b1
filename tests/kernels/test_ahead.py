"""What `hla.kernels.ahead` does when a rehearsal or a compilation fails. (What it foresees: test_offline.py.)"""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from hla.kernels import ahead


@pytest.fixture(autouse=True)
def nothing_is_coming(monkeypatch):
    monkeypatch.setattr(ahead, "_coming", {})


def operation(*launches):
    """One whose forward pass notes launches, of which the last one may be an error."""

    def forward(plan, x, keep):
        assert x.is_meta and ahead.real(x.device) == torch.device("cpu")
        for key, compile_ in launches:
            ahead.local.notes[key] = compile_
        if len(launches) == 1:
            raise ValueError("not foreseen")
        return [x], []

    return SimpleNamespace(forward=forward, first_saved=lambda plan: 1)


def test_a_launch_waits_for_its_kernel_and_no_other():
    begin, compiled = threading.Event(), []
    kernels = operation(("slow", begin.wait), ("fast", lambda: compiled.append("fast")))
    with ahead.expecting(kernels, "", [torch.zeros(3)], None):
        ahead.wait_for("fast")
        assert compiled == ["fast"] and not begin.is_set()
        assert list(ahead._coming) == ["slow"] and ahead.local.expected is None
        begin.set()
        ahead.wait_for("slow")
        ahead.wait_for("unknown")
    assert not ahead._coming and ahead.local.notes is None and ahead.local.device is None


def test_what_cannot_be_foreseen_is_told_and_compiled_as_it_comes():
    with ahead.expecting(operation(("one", lambda: None)), "", [torch.zeros(3)], None):
        with pytest.warns(UserWarning, match="compiled one after another.*not foreseen"):
            ahead.wait_for("one")
        ahead.wait_for("one")  # told once
    assert not ahead._coming and ahead.local.notes is None and ahead.local.device is None


def test_a_kernel_that_cannot_be_compiled_ahead_is_left_to_its_launch():
    failed: Future = Future()
    failed.set_exception(RuntimeError("ptxas"))
    ahead._coming["key"] = failed
    ahead.wait_for("key")
    assert not ahead._coming


def test_after_ctrl_c_nothing_more_is_compiled(monkeypatch):
    waiting, running = Future(), Future()
    running.set_running_or_notify_cancel()
    monkeypatch.setattr(running, "exception", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    ahead._coming.update(now=running, later=waiting)
    with pytest.raises(KeyboardInterrupt):
        ahead.wait_for("now")
    assert waiting.cancelled()
    ahead.wait_for("later")  # left to its launch


def test_without_threads_launches_compile(monkeypatch):
    class NoThreads:
        def __init__(self, *_):
            pass

        def submit(self, function):
            raise RuntimeError("can't start new thread")

        def shutdown(self, wait):
            pass

    monkeypatch.setattr(ahead, "ThreadPoolExecutor", NoThreads)
    with ahead.expecting(operation(("one", print), ("two", print)), "", [torch.zeros(3)], None):
        ahead.wait_for("one")
    assert not ahead._coming
