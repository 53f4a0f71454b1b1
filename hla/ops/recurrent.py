"""The operators token by token: the form that decodes, and the plainest statement of what the states mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hla.ops.checks import HAS_TRITON, Call, chebyshev_nodes, check_call, check_state, check_state_indices
from hla.ops.family import readings, transforms_keys
from hla.ops.linear_attn import compute_dtype, no_autocast
from hla.ops.state import State, is_packed, pack, unpack, zeros


def step(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None,
    *,
    order: int | None = None,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: float | Tensor | None = None,
    gain: float | Tensor = 1.0,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    value_ridge: float | Tensor = 0.0,
    value_gain: float | Tensor = 1.0,
    nodes: Tensor | None = None,
    out_state: State | None = None,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, State]:
    """One token of an operator: update the state, then read it. Cost and memory do not depend on the position.

    Or 1 to 8 tokens, one after the other: the tensors then have a dimension T behind B (``[B, T, ...]``), and the state
    moves once per call instead of once per token.

    On a CUDA device one kernel does both (`hla.kernels.step`, where Triton is installed), except for orders with more
    than one inner reading, in float64, and where a gradient is asked for: those take the PyTorch form.

    Args:
        op: "linear_attn", "hla2", "ahla", "hla3", "hla_n" or "hla_q"; order: of hla_n, ahla (2) and hla_q (4).
        q: ``[B, HQ, K]``, or ``[B, T, HQ, K]`` with T from 1 to 8, as all that follow: k: ``[B, HKV, K]``.
            v: ``[B, HKV, V]``. g: ``[B, HKV]``.
        p: "q", "k" or ``[B, HQ or HKV, K]``.
        gain, ridge, value_gain, value_ridge: float or ``[B, heads of p]``; a ridge of None is the operator's
            default, 0, or 1 for hla_q.
        nodes: of hla_q: ``[order + 1]``, ``[HQ, order + 1]`` or ``[B, HQ, order + 1]``.
        state: what an earlier call returned (B rows), or None for the empty state; float32 (float64 for float64
            inputs), or bfloat16 on request: half the memory, and rounded after every call (hla_q with K above 128
            on a CUDA device: after every token). ``state.pack()`` halves the S of hla2, hla3, hla_n and hla_q.
        out_state: where the new state is written; it may be ``state`` itself (in place), and is returned. Packed if
            ``state`` is; with ``state=None`` as it likes.
        state_indices: int ``[B]``: row b of the batch uses row ``state_indices[b]`` of ``state`` and ``out_state``,
            which may have any number of rows (the slots of an engine). Without ``out_state``, a copy of ``state`` with
            those rows replaced is returned. No slot may be named twice.

    Returns:
        o ``[B, HQ, V]`` or ``[B, T, HQ, V]`` in the dtype of v, and the state after the last token.

    Raises:
        ValueError, TypeError: with the name of the argument that does not fit; for T outside 1 to 8.
    """
    slots = None
    if state_indices is not None:
        held = state if state is not None else out_state
        if held is None:
            raise ValueError("state_indices picks rows of state, which is None (with out_state None too)")
        slots = next((x.shape[0] for x in held if isinstance(x, Tensor)), 0) if isinstance(held, tuple) else 0
    call = check_call(
        op, q, k, v, order=order, g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize, eps=eps,
        value_ridge=value_ridge, value_gain=value_gain, nodes=nodes, initial_state=state, step=True, slots=slots,
        state_name="state",
    )  # fmt: skip
    rows = q.shape[0] if slots is None else slots
    if out_state is not None and out_state is not state:
        check_state(call, out_state, rows, "out_state", may_be_packed=True)
        if state is not None and is_packed(state) != is_packed(out_state):
            raise ValueError("out_state.S must be packed where state.S is, and only there: see state.pack()")
    if state_indices is not None:
        check_state_indices(state_indices, q.shape[0], rows, q.device)
    if HAS_TRITON and q.device.type == "cuda":
        from hla.kernels.step import fused_step, supports

        if supports(call, state, out_state):
            return fused_step(call, state, out_state, state_indices)
    source = state
    if source is None:
        source = empty_state(call, rows)
        source = source.pack() if is_packed(out_state) else source  # type: ignore[union-attr]
    if state_indices is None:
        o, new = update_all(call, source, in_place=out_state is source and not torch.is_grad_enabled())
        if out_state is not None:
            return o, _write(new, out_state, None)
        return o, new if state is None else _map(lambda x, old: x.to(old.dtype), new, state)

    index = state_indices.long()
    o, new = update_all(call, _map(lambda x: x[index], source))
    return o, _write(new, _map(Tensor.clone, source) if out_state is None else out_state, index)


def empty_state(call: Call, batch: int) -> State:
    """The empty state that fits a call."""
    return zeros(
        call.op, batch, call.q.shape[-2], call.k.shape[-2], call.q.shape[-1], call.v.shape[-1], order=call.order,
        p_heads=call.p.shape[-2], normalize=call.normalize, dtype=compute_dtype(call.q, call.v), device=call.q.device,
    )  # fmt: skip


def update_all(call: Call, state: Any, in_place: bool = False) -> tuple[Tensor, State]:
    """`update` by the one token of a step or by its T, with a state that may be packed."""
    packed = is_packed(state)
    if packed:
        state = state.unpack()
    if call.q.dim() == 3:
        o, state = update(call, state, in_place)
    else:
        outputs = []
        for token in _tokens(call, 0, call.q.shape[1]):
            o, state = update(token, state, in_place)
            outputs.append(o)
        o = torch.stack(outputs, 1)
    return o, state.pack() if packed else state


def _tokens(call: Call, start: int, end: int) -> Iterator[Call]:
    """Tokens ``start .. end - 1`` of a call, each as a call for `update`."""
    c = call
    for t in range(start, end):
        at = lambda x, t=t: x[:, t] if isinstance(x, Tensor) else x  # noqa: E731
        yield Call(
            c.op, c.order, at(c.q), at(c.k), at(c.v), at(c.g), at(c.p), at(c.ridge), at(c.gain),
            at(c.value_ridge), at(c.value_gain), c.scale, c.normalize, c.eps, None, True, None, at(c.nodes),
        )  # fmt: skip


def update(call: Call, state: State, in_place: bool = False) -> tuple[Tensor, State]:
    """The recurrence of one token: ``moment <- exp(g) moment + key x^T``, then ``x <- reading``; ``[B, H, D]``.

    in_place: the moments of ``state`` are overwritten (those with the dtype of the computation).
    """
    with no_autocast(call.q):
        return _update(call, state, in_place)


def _update(call: Call, state: State, in_place: bool) -> tuple[Tensor, State]:
    c, dtype = call, compute_dtype(call.q, call.v)
    S, moments, ones = unpack(c.op, c.order, state)
    q, k, v, p = (x.to(dtype) for x in (c.q, c.k, c.v, c.p))
    decay = None if c.g is None else c.g.to(dtype).exp()

    keys = {"k": k}
    if transforms_keys(c.op, c.order):
        assert S is not None
        S = _accumulate(S, k, k, None if decay is None else decay * decay, in_place)
        keys["k~"] = _shape(_read(p, S) * c.scale, p, c.gain, c.ridge)

    def read(x: Tensor, old: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        new = []
        for reading, moment in zip(readings(c.op, c.order), old, strict=True):
            moment = _accumulate(moment, keys[reading.keys], x, decay, in_place)
            new.append(moment)
            gain, ridge = c.shaping(reading.shaped_by)
            x = _shape(_read(q if reading.query == "q" else p, moment) * c.scale, x, gain, ridge)
        return x, new

    if c.op == "hla_q":
        assert S is not None
        S = _accumulate(S, k, k, decay, in_place)
        q = _query_side(c, q, S)
    o, moments = read(v, moments)
    if c.normalize:
        assert ones is not None
        denominator, ones = read(torch.ones_like(v[..., :1]), [x.unsqueeze(-1) for x in ones])
        o = o / (denominator + c.eps)
        ones = [x.squeeze(-1) for x in ones]
    return o.to(c.v.dtype), pack(c.op, c.order, S, moments, ones)


def _query_side(c: Call, q: Tensor, S: Tensor) -> Tensor:
    """``x_order`` of `hla.ops.query_side`: towards ``(S + ridge I)^{-1} q``."""
    assert c.order is not None
    nodes = chebyshev_nodes(c.order, q.dtype, q.device) if c.nodes is None else c.nodes
    heads, group = S.shape[0] * S.shape[1], q.shape[1] // S.shape[1]
    trace = _to_heads(S.diagonal(dim1=-2, dim2=-1).sum(-1), q.shape[1])[..., None]
    ridge = c.ridge[..., None] if isinstance(c.ridge, Tensor) else c.ridge
    steps = 1 / (nodes.to(q.dtype) * trace + ridge)
    # From here on a batch of key heads, each with the queries of its group.
    first, *later = steps.reshape(heads, group, steps.shape[-1], 1).unbind(2)
    if isinstance(ridge, Tensor):
        ridge = ridge.reshape(heads, group, 1)
    start, S = q.reshape(heads, group, q.shape[-1]), S.flatten(0, 1)
    x = start * first
    for size in later:
        x = torch.addcmul(x, torch.baddbmm(start, x, S, alpha=-1) - ridge * x, size)
    return x.view(q.shape)


def loop(call: Call) -> tuple[Tensor, State | None]:
    """A whole sequence as a loop over tokens: same arguments and results as the chunk form, O(1) state, O(T) steps."""
    c = call
    if c.cu_seqlens is None:
        borders, batch = [0, c.q.shape[1]], c.q.shape[0]
    else:
        borders, batch = c.cu_seqlens.tolist(), len(c.cu_seqlens) - 1
    initial = c.initial_state if c.initial_state is not None else empty_state(c, batch)
    outputs, finals = [], []
    for n, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        state = initial if c.cu_seqlens is None else _map(lambda x, n=n: x[n : n + 1], initial)
        for token in _tokens(c, start, end):
            o, state = update(token, state)
            outputs.append(o)
        finals.append(state)
    o = torch.stack(outputs, 1) if outputs else c.v.new_zeros(c.q.shape[0], 0, c.q.shape[2], c.v.shape[3])
    if not c.output_final_state:
        return o, None
    return o, finals[0] if c.cu_seqlens is None else _map(lambda *x: torch.cat(x), *finals)


def _accumulate(moment: Tensor, key: Tensor, x: Tensor, decay: Tensor | None, in_place: bool) -> Tensor:
    """``exp(g) moment + key x^T``; ``moment [B, H, K, V]``, key and x with heads of which one divides the other."""
    heads = moment.shape[1]
    target = moment if in_place and moment.dtype == key.dtype else None
    if decay is not None:
        moment = torch.mul(moment, _to_heads(decay, heads)[..., None, None], out=target)
    return torch.addcmul(moment, _to_heads(key, heads).unsqueeze(-1), _to_heads(x, heads).unsqueeze(-2), out=target)


def _read(query: Tensor, moment: Tensor) -> Tensor:
    """``moment^T query``; the queries of a group read the one moment they share."""
    grouped = query.unflatten(1, (moment.shape[1], query.shape[1] // moment.shape[1]))
    return (grouped @ moment).flatten(1, 2)


def _shape(x: Tensor, residual: Tensor, gain: float | Tensor, ridge: float | Tensor) -> Tensor:
    if isinstance(gain, Tensor):
        x = x * gain[..., None]
    elif gain != 1.0:
        x = x * gain
    if isinstance(ridge, Tensor):
        return x + ridge[..., None] * _to_heads(residual, x.shape[1])
    return x + ridge * _to_heads(residual, x.shape[1]) if ridge != 0.0 else x


def _to_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _map(function, state: State, *more: State) -> State:
    cls: Any = type(state)
    return cls(*(None if x[0] is None else function(*x) for x in zip(state, *more, strict=True)))


def _write(new: State, out: State, index: Tensor | None) -> State:
    for x, target in zip(new, out, strict=True):
        if x is not None and target is not None:
            target.copy_(x) if index is None else target.index_copy_(0, index, x)
    return out
