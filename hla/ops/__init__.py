"""The operators. Read `reference` (definitions), `family` (the idea), `linear_attn` (the primitive), `higher_order`.

This file holds the dispatch table, operator x form x backend -> function of one checked `Call`. Where a
backend has no function for an operator but registers the primitive as "la", the composition over it is used. A new
kernel is one line here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hla.ops import recurrent
from hla.ops.checks import HAS_TRITON, Call
from hla.ops.family import OPS
from hla.ops.higher_order import compose, one_by_one
from hla.ops.query_side import compose_query_side
from hla.ops.state import State


def composition(op: str) -> Callable:
    """The operator as chains of the primitive."""
    return compose_query_side if op == "hla_q" else compose


def fused(call: Call) -> tuple[Tensor, State | None]:
    """The Triton kernels, imported when first called for."""
    from hla.kernels import run

    return run(call)


DISPATCH: dict[tuple[str, str, str], Callable] = {
    **{(op, "chunk", "torch"): composition(op) for op in OPS},
    **{(op, "chunk", "triton"): fused for op in OPS},
    **{(op, "recurrent", "torch"): recurrent.loop for op in OPS},
}


def dispatch(
    op: str, form: str, backend: str | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> Callable:
    """The function ``Call -> (o, state)`` for an operator in a form ("chunk" or "recurrent").

    ``backend=None`` takes the fastest one that runs on the device in this dtype; a backend asked for by name is used
    or refused.
    """
    if backend is None:
        backend = "triton" if device.type == "cuda" and dtype != torch.float64 and HAS_TRITON else "torch"
    if backend == "triton":
        check_triton(device, dtype)
    if (op, form, backend) in DISPATCH:
        return DISPATCH[op, form, backend]
    if form == "chunk" and ("la", form, backend) in DISPATCH:
        return partial(composition(op), run=partial(one_by_one, la=DISPATCH["la", form, backend]))
    known = sorted({b for (o, f, b) in DISPATCH if o in (op, "la") and f == form})
    raise ValueError(f"backend {backend!r} has no {form} form of {op} on {device.type}; available: {', '.join(known)}")


def check_triton(device: torch.device, dtype: torch.dtype) -> None:
    """Refuses the Triton kernels, asked for by name, where they cannot run."""
    if not HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs tensors on a CUDA device; these are on {device.type!r}")
    if dtype == torch.float64:
        raise ValueError("backend 'triton' has no float64 kernels; use backend 'torch'")
