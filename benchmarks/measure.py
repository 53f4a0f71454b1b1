"""The one way this project measures: interleaved repetitions, medians, peak memory, and where it was measured."""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hla


def environment(device: str) -> dict[str, str]:
    """Device, versions, commit and date: the columns every row of a result has."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": "" if device == "cuda" else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hla": hla.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_software() -> dict[str, str]:
    """What else decides how fast a GPU is: driver, CUDA, and the packages with kernels ("" where not installed)."""
    return {
        "driver": _driver(),
        "cuda": str(torch.version.cuda or ""),
        "triton": _version("triton"),
        "fla": _version("flash-linear-attention", "fla-core"),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(*distributions: str) -> str:
    """Version of the first of these that is installed, or ""."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _commit() -> str:
    def git(*args: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    if "HLA_COMMIT" in os.environ:  # a copy of the tree without its history is told
        return os.environ["HLA_COMMIT"]
    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved_medians(
    functions: dict[str, Callable[[], object]], device: str, seconds: float, min_reps: int = 3
) -> dict[str, float]:
    """Median milliseconds of each function; rounds over all of them until each had about ``seconds``.

    Interleaving lets a disturbance of the machine hit all functions alike, so that ratios hold.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    one_round = _round_on_gpu if device == "cuda" else _round
    for function in functions.values():
        function()  # warm-up
    while True:
        todo = {n: f for n, f in functions.items() if len(times[n]) < min_reps or sum(times[n]) < seconds}
        if not todo:
            return {name: 1e3 * statistics.median(t) for name, t in times.items()}
        for name, t in one_round(todo).items():
            times[name].append(t)


def _round(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one call of each function."""
    times = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        times[name] = time.perf_counter() - start
    return times


def _round_on_gpu(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The same between CUDA events, all calls queued at once.

    Clearing the L2 cache before each call keeps one function from finding its inputs where another left them, and
    gives the CPU the time to launch ahead, as it does within a model.
    """
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    events = {}
    # Without a start the first function of a round would be measured while the CPU launches it.
    torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
    for name, function in functions.items():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        start.record()
        function()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: 1e-3 * start.elapsed_time(end) for name, (start, end) in events.items()}


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """Largest memory in use during one call, above what was in use before it (None where it can't be measured)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=None)


def saved_bytes(function: Callable[[], torch.Tensor], device: str) -> int | None:
    """Memory that a result holds for its backward pass, beyond the inputs and itself (None where it can't be told)."""
    if device != "cuda":
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    output = function()
    return torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
