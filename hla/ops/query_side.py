"""The third switch: a polynomial of the key moment transforms the query.

The best linear read-out of the two moments ``S_t = sum_j exp(c_t - c_j) k_j k_j^T`` and
``P_t = sum_j exp(c_t - c_j) k_j v_j^T`` is ridge regression of the values on the keys,
``o_t = P_t^T (S_t + lambda_t I)^{-1} q_t`` (von Oswald et al. 2025 solve it by conjugate gradients). `hla_q`
approaches it by a polynomial of S_t: ``order`` readings of the one state S, each a linear attention ``LA(x, k, k; g)``,
and then one reading of P:

    x_0 = q_t / theta_0,    x_n = x_{n-1} + (q_t - (S_t + lambda_t I) x_{n-1}) / theta_n,    o_t = scale P_t^T x_order,

Richardson's iteration with step sizes ``1 / theta_n``. The spectrum of ``S_t + lambda I`` lies between ``lambda`` and
``lambda + trace(S_t)``, so the steps are given by *nodes* in units of the trace, ``theta_n = lambda_t + node_n
trace(S_t)``. Chebyshev's nodes (the default) make the error over the whole interval as small as a polynomial of this
order can; learned ones adapt to the spectrum of real keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hla.ops.checks import Call
from hla.ops.linear_attn import Stage, chain, compute_dtype
from hla.ops.state import HLAQState, State


def compose_query_side(call: Call, run: Callable = chain) -> tuple[Tensor, State | None]:
    """`hla_q` as chains of linear attentions: the trace of S, the readings of S, the reading of P."""
    c, dtype = call, compute_dtype(call.q, call.v)
    assert c.order is not None and c.nodes is not None
    S = P = trace = None
    if c.initial_state is not None:
        assert isinstance(c.initial_state, HLAQState)
        S, P = c.initial_state
        trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]

    squares = c.k.to(dtype).square().sum(-1, keepdim=True)
    ones = torch.ones_like(squares)
    (trace,), _ = run(
        [Stage("trace", "1", "k^2", "1")], {"1": ones, "k^2": squares}, {}, c.g,
        outputs={"trace": dtype}, initial_states=[trace], cu_seqlens=c.cu_seqlens,
        output_final_states=False,
    )  # fmt: skip

    # [order + 1, B, T, HQ]: the steps 1 / theta_n and what the ridge leaves of x
    nodes = c.nodes.to(dtype).movedim(-1, 0)
    bound = trace[..., 0].repeat_interleave(nodes.shape[-1] // trace.shape[2], dim=-1)
    steps = 1 / (nodes * bound + c.ridge)
    kept = 1 - steps[1:] * c.ridge
    tensors = {"q": c.q, "k": c.k, "v": c.v, "x0": c.q.to(dtype) * steps[0][..., None]}
    per_token: dict[str, Tensor] = {}
    stages = []
    for n in range(1, c.order + 1):
        per_token |= {f"-step{n}": -steps[n], f"step{n}": steps[n], f"kept{n}": kept[n - 1]}
        residuals = ((f"kept{n}", f"x{n - 1}"), (f"step{n}", "q"))
        stages.append(Stage(f"x{n}", f"x{n - 1}", "k", "k", gain=f"-step{n}", residuals=residuals))
    stages.append(Stage("o", f"x{c.order}", "k", "v", gain=c.scale))
    (o,), finals = run(
        stages, tensors, per_token, c.g,
        outputs={"o": c.v.dtype}, initial_states=[S] * c.order + [P], cu_seqlens=c.cu_seqlens,
        output_final_states=c.output_final_state,
    )  # fmt: skip
    return o, HLAQState(finals[0], finals[-1]) if c.output_final_state else None
