"""Measurements that only a GPU has: its ceilings, kernels launched, and calls captured in a CUDA graph."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import interleaved_medians


class Ceilings(NamedTuple):
    """Copy bandwidth in bytes / s (read and written), bfloat16 matmul rate in FLOP / s."""

    bandwidth: float
    rate: float


def ceilings(device: str, seconds: float, gib: float = 2.0, n: int = 8192) -> Ceilings:
    source = torch.zeros(int(gib * 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = interleaved_medians({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device, seconds)
    return Ceilings(2 * source.numel() / (1e-3 * times["copy"]), 2 * n**3 / (1e-3 * times["matmul"]))


def kernels_launched(function: Callable[[], object], device: str) -> int | None:
    """CUDA kernels in one call, without copies and fills by the driver (None on a CPU)."""
    if device != "cuda":
        return None
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events)


def in_graph(functions: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """Functions, one after the other, as one CUDA graph, as a decoding model has its layers (a loop on a CPU)."""

    def loop() -> None:
        for function in functions:
            function()

    if device != "cuda":
        return loop
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever compiles must have compiled before the capture
        for _ in range(2):
            loop()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()

    def replay() -> None:
        graph.replay()

    replay.keeps = functions  # type: ignore[attr-defined]  # a graph does not keep the tensors it was captured with
    return replay
