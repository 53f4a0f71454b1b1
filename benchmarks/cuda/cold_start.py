"""How long the first call takes in a new process with nothing compiled, and that other lengths compile nothing.

``python -m benchmarks.cuda.cold_start OPERATOR`` is that process: it prints one JSON row per call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import synchronize
from benchmarks.operators import operators

OPERATORS = ("hla2", "hla_q default form")
# What is called first, and what is changed after it: (call, batch, tokens, sequences packed in a row or 0)
CALLS = (
    ("first call", 8, 4096, 0),
    ("again", 8, 4096, 0),
    ("other length", 8, 3000, 0),
    ("other batch", 3, 4096, 0),
    ("packed", 1, 16384, 5),
    ("other packing", 1, 10001, 3),
)


def inputs(batch: int, length: int, heads: int, dim: int, device: str) -> list[Tensor]:
    q, k, v, do = (
        F.normalize(torch.randn(batch, length, heads, dim, device=device), dim=-1).to(torch.bfloat16) for _ in range(4)
    )
    g, ridge = torch.full(q.shape[:3], -0.02, device=device), torch.full(q.shape[:3], 1.02, device=device)
    return [*(x.requires_grad_() for x in (q, k, v, g, ridge)), do]


def one_call(operator: str, tensors: list[Tensor], cu_seqlens: Tensor | None) -> None:
    q, k, v, g, ridge, do = tensors
    o = operators(q, k, v, g=g, ridge=ridge, cu_seqlens=cu_seqlens)[operator]()
    leaves = (q, k, v, g, ridge) if operator.startswith("hla_q") else (q, k, v)
    torch.autograd.grad(o, leaves, do)


def compiled() -> int:
    """Kernels that Triton has compiled into this process's cache."""
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


def child(operator: str, heads: int, dim: int, device: str, shrink: int) -> None:
    """Makes the calls in this process; ``shrink`` divides batch and length where time is short."""
    torch.zeros(1, device=device)  # the context of the device is not the operator's
    for call, batch, length, sequences in CALLS:
        batch, length = max(1, batch // shrink), max(16, length // shrink)
        tensors = inputs(batch, length, heads, dim, device)
        cu_seqlens = None
        if sequences:
            cu_seqlens = torch.linspace(0, length, sequences + 1, device=device).int()
        before = compiled()
        synchronize(device)
        start = time.perf_counter()
        one_call(operator, tensors, cu_seqlens)
        synchronize(device)
        seconds = time.perf_counter() - start
        row = {"call": call, "B": batch, "T": length, "H": heads, "D": dim, "packed": sequences}
        row |= {"seconds": round(seconds, 4), "kernels_compiled": compiled() - before}
        print(json.dumps(row), flush=True)


def measure(operator: str, heads: int, dim: int, device: str, timeout: float, shrink: int = 1) -> list[dict[str, Any]]:
    """Rows of one operator, from a new process with an empty cache of compiled kernels."""
    command = [sys.executable, "-m", "benchmarks.cuda.cold_start", operator]
    command += ["--heads", str(heads), "--dim", str(dim), "--device", device, "--shrink", str(shrink)]
    rows: list[dict[str, Any]] = []
    error = ""
    with tempfile.TemporaryDirectory() as cache:
        where = os.environ | {"TRITON_CACHE_DIR": cache}
        root = Path(__file__).parents[2]
        try:
            run = subprocess.run(command, env=where, cwd=root, capture_output=True, text=True, timeout=timeout)
            rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
            if run.returncode:
                error = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1][:160]
        except subprocess.TimeoutExpired:
            error = f"not done after {timeout:.0f} s"
    empty = dict.fromkeys(("call", "B", "T", "H", "D", "packed", "seconds", "kernels_compiled"), "")
    rows = [{"operator": operator, **row, "error": ""} for row in rows]
    return rows + ([{"operator": operator, **empty, "error": error}] if error else [])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=OPERATORS)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1)
    args = parser.parse_args()
    child(args.operator, args.heads, args.dim, args.device, args.shrink)
