"""The operators. Read `reference` (definitions), `family` (the idea), `linear_attn` (the primitive), `higher_order`.

This file holds the dispatch table, operator x form x backend -> function of one checked `Call`. Where a
backend has no function for an operator but registers the primitive as "la", the composition over it is used. A new
kernel is one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hla.ops import recurrent
from hla.ops.family import OPS
from hla.ops.higher_order import compose, one_by_one
from hla.ops.query_side import compose_query_side


def composition(op: str) -> Callable:
    """The operator as chains of the primitive."""
    return compose_query_side if op == "hla_q" else compose


DISPATCH: dict[tuple[str, str, str], Callable] = {
    **{(op, "chunk", "torch"): composition(op) for op in OPS},
    **{(op, "recurrent", "torch"): recurrent.loop for op in OPS},
}


def dispatch(op: str, form: str, backend: str | None, device: torch.device) -> Callable:
    """The function ``Call -> (o, state)`` for an operator in a form ("chunk" or "recurrent").

    ``backend=None`` takes the fastest one registered for the device; a backend asked for by name is used or refused.
    """
    preferred = ("triton", "torch") if device.type == "cuda" else ("torch",)
    for name in preferred if backend is None else (backend,):
        if (op, form, name) in DISPATCH:
            return DISPATCH[op, form, name]
        if form == "chunk" and ("la", form, name) in DISPATCH:
            return partial(composition(op), run=partial(one_by_one, la=DISPATCH["la", form, name]))
    known = sorted({b for (o, f, b) in DISPATCH if o in (op, "la") and f == form})
    raise ValueError(f"backend {backend!r} has no {form} form of {op} on {device.type}; available: {', '.join(known)}")
