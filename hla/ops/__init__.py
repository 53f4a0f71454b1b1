"""The operators. Read `reference` (definitions), `family` (the idea), `linear_attn` (the primitive), `higher_order`.

This file holds the dispatch table, operator x form x backend -> function of one checked `Call`. The operator "la" is
the primitive: where a backend has no fused function for an operator, the composition over its primitive is used. A new kernel is one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hla.ops import recurrent
from hla.ops.family import OPS
from hla.ops.higher_order import compose
from hla.ops.linear_attn import la

FORMS = ("chunk", "recurrent")
DISPATCH: dict[tuple[str, str, str], Callable] = {
    ("la", "chunk", "torch"): la,
    **{(op, "recurrent", "torch"): recurrent.loop for op in OPS},
}


def dispatch(op: str, form: str, backend: str | None, device: torch.device) -> Callable:
    """The function ``Call -> (o, state)`` for an operator in a form.

    ``backend=None`` takes the fastest one registered for the device; a backend asked for by name is used or refused.
    """
    on_gpu = device.type == "cuda"
    for name in (("triton", "torch") if on_gpu else ("torch",)) if backend is None else (backend,):
        if (op, form, name) in DISPATCH:
            return DISPATCH[op, form, name]
        if form == "chunk" and ("la", form, name) in DISPATCH:
            return partial(compose, la=DISPATCH["la", form, name])
    known = sorted({b for (o, f, b) in DISPATCH if o in (op, "la") and f == form})
    raise ValueError(f"backend {backend!r} has no {form} form of {op} on {device.type}; available: {', '.join(known)}")
