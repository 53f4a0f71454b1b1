"""Processes that wait for work: a test runs one function on all ranks of a gloo group."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIZES = (1, 2, 4)
TIMEOUT = 300  # seconds for one function on all ranks, on a busy machine too; half of that for one collective
MODULES = ["hla.models", "hla.distributed.training", "hla.train", "tests.ops.cases"]


def run_snippet(page: str, first_line: str, processes: int, folder: Path) -> list[float]:
    """The losses that the Python block of a page with this first line prints under torchrun, started in a folder."""
    (snippet,) = re.findall(rf"```python\n({re.escape(first_line)}.*?)```", page, re.DOTALL)
    script = folder / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [*torchrun, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == 0, run.stderr
    return [float(x) for x in re.findall(r"loss ([\d.]+)", run.stdout)]


class Ranks:
    """Processes, started once; `run` calls ``function(groups by size, rank, *args)`` on all of them."""

    def __init__(self, count: int = 4):
        # A server that has imported everything forks them: nothing is imported four times.
        context = get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, f"{self.folder.name}/meet", there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        self.alive = True

    def run(self, function, *args) -> None:
        """Raises what any rank raised."""
        for pipe in self.pipes:
            pipe.send((function, args))
        end = time.monotonic() + TIMEOUT
        answers = [pipe.recv() if pipe.poll(max(0, end - time.monotonic())) else "no answer" for pipe in self.pipes]
        errors = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer is not None]
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))

    def close(self) -> None:
        self.alive = False
        for process in self.processes:
            process.kill()  # it may be one that takes note of SIGTERM
            process.join()
        self.folder.cleanup()


def _serve(rank: int, count: int, path: str, pipe) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # (a shell that starts tests behind it has it ignored)
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    os.environ["GLOO_SOCKET_IFNAME"] = ",".join(loopback[:1])  # the name of this machine may lead nowhere
    patience = timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=count, timeout=patience)
    groups = {n: dist.new_group(list(range(n)), timeout=patience) for n in SIZES if n <= count}
    while True:
        function, args = pipe.recv()
        try:
            torch.manual_seed(0)
            function(groups, rank, *args)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
