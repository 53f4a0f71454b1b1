"""The operators as compositions of the primitive: chunk-parallel, O(T), exact, differentiable.

`compose` is the whole mathematics: transform the keys if the operator asks for it, then read the values once per
`Reading` of the family. The public functions check their arguments and hand them to the dispatch table, which picks a
fused kernel where one is registered and `compose` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hla.ops.checks import HLA_Q_ORDER, Call, check_backend, check_call
from hla.ops.family import readings, transforms_keys
from hla.ops.layout import Packed
from hla.ops.linear_attn import CHUNK, Stage, chain, compute_dtype, la
from hla.ops.state import (
    AHLANState,
    AHLAState,
    HLA2State,
    HLA3State,
    HLANState,
    HLAQState,
    LinearAttnState,
    State,
    pack,
    unpack,
)

PerToken = float | Tensor


def compose(call: Call, run: Callable = chain) -> tuple[Tensor, State | None]:
    """Any operator as a chain of linear attentions: the transformed keys if there are any, then every reading.

    ``run`` executes chains: `hla.ops.linear_attn.chain`, or `one_by_one` over a backend's primitive.
    """
    c, dtype = call, compute_dtype(call.q, call.v)
    tensors, per_token = {"q": c.q, "k": c.k, "v": c.v}, {}
    p = "q" if c.p is c.q else "k" if c.p is c.k else "p"
    tensors[p] = c.p

    def stage(out: str, query: str, keys: str, values: str, residual: str, shaped_by: str | None, gate: int) -> Stage:
        gain, ridge = c.shaping(shaped_by)
        if isinstance(gain, Tensor):
            per_token[f"{shaped_by}.gain"] = gain * c.scale
        if isinstance(ridge, Tensor):
            per_token[f"{shaped_by}.ridge"] = ridge
        return Stage(
            out=out,
            query=query,
            keys=keys,
            values=values,
            gate=gate,
            gain=f"{shaped_by}.gain" if isinstance(gain, Tensor) else gain * c.scale,
            residuals=()
            if isinstance(ridge, float) and ridge == 0.0
            else ((f"{shaped_by}.ridge" if isinstance(ridge, Tensor) else ridge, residual),),
        )

    def readings_of(x: str) -> list[Stage]:
        """The readings of the values called x."""
        stages = []
        for i, reading in enumerate(readings(c.op, c.order)):
            values, query = x if i == 0 else f"{x}{i}", "q" if reading.query == "q" else p
            stages.append(stage(f"{x}{i + 1}", query, reading.keys, values, values, reading.shaped_by, gate=1))
        return stages

    stages = [stage("k~", p, "k", "k", p, "gain", gate=2)] if transforms_keys(c.op, c.order) else []
    stages += readings_of("v")
    o = stages[-1].out
    outputs = {o: dtype if c.normalize else c.v.dtype}
    if c.normalize:
        tensors["1"] = torch.ones((*c.v.shape[:-1], 1), dtype=dtype, device=c.v.device)
        stages += readings_of("1")
        outputs[stages[-1].out] = dtype

    initial: list[Tensor | None] = [None] * len(stages)
    if c.initial_state is not None:
        S, moments, ones = unpack(c.op, c.order, c.initial_state)
        initial = [] if S is None else [S]
        initial += [*moments, *(x.unsqueeze(-1) for x in ones or ())]
    results, finals = run(
        stages, tensors, per_token, c.g, outputs=outputs, initial_states=initial, cu_seqlens=c.cu_seqlens,
        output_final_states=c.output_final_state,
    )  # fmt: skip
    y = (results[0] / (results[1] + c.eps)).to(c.v.dtype) if c.normalize else results[0]
    if not c.output_final_state:
        return y, None
    S = finals.pop(0) if transforms_keys(c.op, c.order) else None
    count = len(readings(c.op, c.order))
    ones = [x.squeeze(-1) for x in finals[count:]] if c.normalize else None
    return y, pack(c.op, c.order, S, finals[:count], ones)


def one_by_one(
    stages: Sequence[Stage],
    tensors: dict[str, Tensor],
    per_token: dict[str, Tensor],
    g: Tensor | None,
    *,
    outputs: dict[str, torch.dtype],
    initial_states: Sequence[Tensor | None],
    cu_seqlens: Tensor | None = None,
    output_final_states: bool = True,
    la: Callable = la,
) -> tuple[list[Tensor], list[Tensor]]:
    """A chain as one call of the primitive per stage, for backends that have no more than the primitive."""
    x = {**tensors, **per_token}
    dtype, finals = compute_dtype(*tensors.values()), []
    for s, state in zip(stages, initial_states, strict=True):
        ridges = [(x[ridge] if isinstance(ridge, str) else ridge, x[name]) for ridge, name in s.residuals]
        ridge, residual = ridges[0] if ridges else (0.0, None)
        y, final = la(
            x[s.query],
            x[s.keys],
            x[s.values],
            None if g is None else s.gate * g,
            gain=x[s.gain] if isinstance(s.gain, str) else s.gain,
            ridge=ridge,
            residual=residual,
            initial_state=state,
            output_final_state=output_final_states,
            mode=s.mode,
            cu_seqlens=cu_seqlens,
            out_dtype=outputs.get(s.out, dtype),
        )
        for ridge, residual in ridges[1:]:
            y = y + (ridge[..., None] if isinstance(ridge, Tensor) else ridge) * residual
        x[s.out] = y
        finals.append(final)
    return [x[name] for name in outputs], finals


def _run(backend: str | None, *args, **kwargs) -> tuple[Tensor, State | None]:
    from hla.ops import dispatch  # the table lists this module's functions

    check_backend(backend)
    call = check_call(*args, **kwargs)
    return dispatch(call.op, "chunk", backend, call.q.device, compute_dtype(call.q, call.v))(call)


_ARGS = """
    Args:
        q: ``[B, T, HQ, K]``. k: ``[B, T, HKV, K]``. v: ``[B, T, HKV, V]``. One dtype (float64, float32, bfloat16 or
            float16), any strides, HQ a multiple of HKV, any T >= 0, K and V up to 256.
        g: log-decay per token ``[B, T, HKV]``, float32, ``<= 0``; None means no decay.
        scale: factor on every affinity ``q_t . k_j``; None means ``K ** -0.5`` (the paper has 1).
{normalize}        initial_state: the state to continue from, as returned by an earlier call; None means empty.
        output_final_state: also return the state after the last token.
        cu_seqlens: int32 or int64 ``[N + 1]``: N independent sequences packed into one row (B = 1), sequence n being
            tokens ``cu_seqlens[n] .. cu_seqlens[n + 1] - 1``. States then have N rows.
        backend: None chooses by device; "torch" or "triton" by name never falls back.
"""
_NORMALIZE = """\
        normalize: divide by the same operator applied to ``v = 1``, plus eps. That denominator is signed in general
            and can pass through zero; it is nonnegative when the features, p, gain and ridge are.
"""
_SHAPING = """        p: inner query: "q", "k", or a tensor ``[B, T, HQ or HKV, K]``.
        gain, ridge: float or per token ``[B, T, heads of p]``, any sign: {shapes}
"""
_RETURNS = """
    Returns:
        o ``[B, T, HQ, V]`` in the dtype of v, and the final {state} in float32 (float64 for float64 inputs), or None.

    Raises:
        ValueError, TypeError: with the name of the argument that does not fit.
    """


def _document(shapes: str, state: type, extra: str = "", normalize: str = _NORMALIZE) -> Callable:
    def add(function: Callable) -> Callable:
        arguments = _ARGS.format(normalize=normalize) + (_SHAPING.format(shapes=shapes) if shapes else "") + extra
        function.__doc__ = (function.__doc__ or "") + arguments + _RETURNS.format(state=state.__name__)
        return function

    return add


@_document(
    "", LinearAttnState,
    "        causal: False lets every token read the whole sequence (encoders); then g and states must not be given.\n",
)  # fmt: skip
def linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: LinearAttnState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """First-order linear attention, ``o_t = scale * sum_{j<=t} exp(c_t - c_j) (q_t . k_j) v_j``.

    (Katharopoulos et al. 2020 without a feature map; Zhang et al. 2025, section 2.2.)
    """
    common: dict[str, Any] = dict(g=g, scale=scale, normalize=normalize, eps=eps, cu_seqlens=cu_seqlens)
    common |= dict(initial_state=initial_state, output_final_state=output_final_state)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    if causal:
        return _run(backend, "linear_attn", q, k, v, **common)
    if g is not None or initial_state is not None or output_final_state:
        raise ValueError("causal=False has no order in time: g, initial_state and output_final_state must not be given")
    check_backend(backend)
    if backend == "triton":
        raise ValueError("causal=False is two matrix products and has no Triton kernel; use backend=None or 'torch'")
    return _full_sequence(check_call("linear_attn", q, k, v, **common)), None


def _full_sequence(c: Call) -> Tensor:
    """``o_t = scale * (sum_j k_j v_j^T)^T q_t`` over the whole sequence: two matrix products."""
    dtype = compute_dtype(c.q, c.v)
    heads, group = c.k.shape[2], c.q.shape[2] // c.k.shape[2]
    if c.cu_seqlens is None:
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (c.q, c.k, c.v))
        P, m = k.mT @ v, k.sum(2)[..., None]  # [B, HKV, K, V], [B, HKV, K, 1]
        grouped = q.unflatten(1, (heads, group)).flatten(2, 3)  # queries of one group as rows
        numerator, denominator = (
            (c.scale * grouped @ x).unflatten(2, (group, q.shape[2])).flatten(1, 2).transpose(1, 2) for x in (P, m)
        )
    else:
        layout = Packed(c.cu_seqlens, c.q.shape[1], CHUNK)
        q, k, v = (layout.load(x, 0, layout.num_chunks, dtype)[0] for x in (c.q, c.k, c.v))  # [M, H, C, D]
        grouped = q.unflatten(1, (heads, group)).flatten(2, 3)

        def read(per_chunk: Tensor) -> Tensor:
            total = per_chunk.new_zeros(layout.sequences, *per_chunk.shape[1:]).index_add(0, layout.sequence, per_chunk)
            y = c.scale * grouped @ total[layout.sequence]
            y = y.unflatten(2, (group, q.shape[2])).flatten(1, 2)[None]
            out = layout.new_output((1, c.q.shape[1], c.q.shape[2], y.shape[-1]), y.device, dtype)
            layout.store(out, y, 0, layout.num_chunks)
            return layout.finish_output(out)

        numerator, denominator = read(k.mT @ v), read(k.sum(2)[..., None])
    o = numerator / (denominator + c.eps) if c.normalize else numerator
    return o.to(c.v.dtype)


@_document("``k~_j = gain_j scale S_j p_j + ridge_j p_j``.", HLA2State)
def hla2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: PerToken = 0.0,
    gain: PerToken = 1.0,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: HLA2State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Second-order linear attention ``tril(W W^T) V`` (Zhang et al. 2025, eqs. 3.3, 3.4 and Theorem 3.1).

    ``W`` is the decayed causal affinity. Linear attention whose keys went through linear attention:
    ``k~ = LA(q, k, k; 2g)``, ``o = LA(q, k~, v; g)``.
    """
    return _run(
        backend, "hla2", q, k, v, g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize, eps=eps,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_document(
    "each inner reading gives ``gain scale LA(p, k, x; g) + ridge x``.", AHLAState,
    f"        order: n >= 1. The state of an order other than 2 is an {AHLANState.__name__}.\n",
)  # fmt: skip
def ahla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = 2,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: PerToken = 0.0,
    gain: PerToken = 1.0,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: AHLAState | AHLANState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Asymmetric higher-order linear attention ``W^n V`` (n = 2: Zhang et al. 2025, eq. 6.1 and Theorem 6.1).

    Linear attention whose values went through linear attention: ``v~ = LA(p, k, v; g)``, ``o = LA(q, k, v~; g)``.
    """
    if order is None:
        raise TypeError("order must be an integer; got None")
    return _run(
        backend, "ahla", q, k, v, order=order, g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize,
        eps=eps, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_document(
    "``k~_j = gain_j scale S_j p_j + ridge_j p_j``.", HLA3State,
    "        value_gain, value_ridge: the same for ``v~_j = value_gain_j scale P_j^T p_j + value_ridge_j v_j``.\n",
)  # fmt: skip
def hla3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: PerToken = 0.0,
    gain: PerToken = 1.0,
    value_ridge: PerToken = 0.0,
    value_gain: PerToken = 1.0,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: HLA3State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Third-order linear attention ``tril(W W^T) W V``: keys and values both went through linear attention.

    ``k~ = LA(p, k, k; 2g)``, ``v~ = LA(p, k, v; g)``, ``o = LA(q, k~, v~; g)``. (The recurrence printed as third order
    in Zhang et al. 2025, section 7, is a different operator.)
    """
    return _run(
        backend, "hla3", q, k, v, g=g, p=p, ridge=ridge, gain=gain, value_ridge=value_ridge, value_gain=value_gain,
        scale=scale, normalize=normalize, eps=eps, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_document("``k~_j = gain_j scale S_j p_j + ridge_j p_j``.", HLANState, "        order: n >= 1.\n")
def hla_n(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: PerToken = 0.0,
    gain: PerToken = 1.0,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: HLANState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Order n: ``tril(W W^T)^(n/2) V`` for even n, ``tril(W W^T)^((n-1)/2) W V`` for odd n.

    n = 1, 2, 3 are `linear_attn`, `hla2` and `hla3`. Every reading but the last uses p.
    """
    return _run(
        backend, "hla_n", q, k, v, order=order, g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize,
        eps=eps, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_document(
    "", HLAQState,
    """        order: readings of S, n >= 1.
        ridge: lambda > 0, float or per token ``[B, T, HQ]``.
        nodes: ``[order + 1]``, ``[HQ, order + 1]`` or per token ``[B, T, HQ, order + 1]``, >= 0, in units of the trace
            of S: the step sizes are ``1 / (ridge + node trace(S_t))``. None means Chebyshev's nodes of [0, 1]. Below
            half the largest eigenvalue over the trace a single step overshoots.
""",
    normalize="",
)  # fmt: skip
def hla_q(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = HLA_Q_ORDER,
    g: Tensor | None = None,
    nodes: Tensor | None = None,
    ridge: PerToken = 1.0,
    scale: float | None = None,
    initial_state: HLAQState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """Linear attention whose query went through ``order`` readings of the key moment S.

    ``o_t = scale P_t^T x``, where x approaches ``(S_t + ridge_t I)^{-1} q_t`` by a polynomial of S_t: the read-out of
    least squares from keys to values. The state is (S, P) for any order (see `hla.ops.query_side`; not in the paper).
    ``scale`` acts on the last reading alone; None means 1 here, for what least squares reads has the size of v.
    """
    if order is None:
        raise TypeError("order must be an integer; got None")
    return _run(
        backend, "hla_q", q, k, v, order=order, g=g, nodes=nodes, ridge=ridge, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
