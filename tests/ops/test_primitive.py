"""The primitive `la`: inclusive, strict and reversed equal their defining sums, with every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hla.ops import linear_attn
from hla.ops.linear_attn import MODES, la
from tests.ops.cases import F64, assert_close, small_chunks  # noqa: F401


def defining_sum(q, k, v, g, mode, initial_state):
    """The three definitions as T x T matrices over expanded heads, and the final state; [B, T, H, ...] float64."""
    heads = max(x.shape[2] for x in (q, k, v, g) if x is not None)
    state_heads = max(x.shape[2] for x in (k, v, g) if x is not None)
    expand = lambda x: x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)  # noqa: E731
    T = q.shape[1]
    gate = q.new_zeros(q.shape[0], heads, T) if g is None else expand(g)
    c, t = gate.cumsum(-1), torch.arange(T)
    q, k, v = expand(q), expand(k), expand(v)
    end = gate.sum(-1, keepdim=True)
    if mode == "reversed":
        exponent, mask = c[..., None, :] - c[..., :, None], t[:, None] <= t
        read, write = end - c, c
    else:
        r = c - gate if mode == "strict" else c
        exponent, mask = r[..., :, None] - c[..., None, :], (t[:, None] > t if mode == "strict" else t[:, None] >= t)
        read, write = r, end - c
    P = q.new_zeros(q.shape[0], heads, q.shape[-1], v.shape[-1])
    if initial_state is not None:
        P = initial_state.repeat_interleave(heads // state_heads, 1)
    o = (q @ k.mT * exponent.masked_fill(~mask, -torch.inf).exp()) @ v + read.exp()[..., None] * (q @ P)
    final = end.exp()[..., None] * P + (write.exp()[..., None] * k).mT @ v
    return o.transpose(1, 2), final.unflatten(1, (state_heads, -1))[:, :, 0]


HEADS = [
    (1, 1, 1, 1),
    (4, 2, 2, 2),
    (4, 4, 2, 2),
    (4, 2, 4, 1),
    (2, 4, 4, 2),
    (2, 2, 2, 4),
    (2, 1, 1, 4),
    (1, 2, 2, 2),
    (6, 2, 6, 1),
]


@given(
    mode=st.sampled_from(MODES),
    heads=st.sampled_from(HEADS),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    packed=st.booleans(),
    gated=st.booleans(),
    dims=st.sampled_from([(3, 5), (4, 4), (5, 2), (1, 1)]),
    shared=st.sampled_from(["none", "k is v", "q is k"]),
    affine=st.sampled_from(["none", "floats", "per token"]),
    with_state=st.booleans(),
    used=st.sampled_from(["output", "state", "both"]),
    chunk=st.sampled_from([4, 16, 64]),
    block=st.sampled_from([1, 1 << 18]),
    seed=st.integers(0, 10**6),
)
def test_equals_its_defining_sum_with_all_gradients(
    mode, heads, lengths, packed, gated, dims, shared, affine, with_state, used, chunk, block, seed
):
    hq, hk, hv, hg = heads
    K, V = dims
    torch.manual_seed(seed)
    leaf = lambda *s: torch.randn(*s, dtype=F64, requires_grad=True)  # noqa: E731
    if not packed:
        lengths = [lengths[0]]
    B, T = (1, sum(lengths)) if packed else (2, lengths[0])
    k = leaf(B, T, hk, K)
    v = k if shared == "k is v" else leaf(B, T, hv, V)
    q = k if shared == "q is k" else leaf(B, T, hq, K)
    g = (-torch.rand(B, T, hg, dtype=F64)).requires_grad_() if gated else None
    hq = q.shape[2]
    state_heads = max(x.shape[2] for x in (k, v, g) if x is not None)
    gain, ridge, residual = 1.0, 0.0, None
    if affine != "none" and hq >= state_heads:
        residual = v
        gain, ridge = (-0.5, 0.7) if affine == "floats" else (leaf(B, T, hq), leaf(B, T, hq))
    state = leaf(len(lengths) if packed else B, state_heads, K, v.shape[3]) if with_state else None
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) if packed else None

    old = linear_attn.CHUNK, linear_attn.BLOCK_NUMBERS
    linear_attn.CHUNK, linear_attn.BLOCK_NUMBERS = chunk, block
    try:
        o, final = la(
            q, k, v, g, gain=gain, ridge=ridge, residual=residual, initial_state=state, output_final_state=True,
            mode=mode, cu_seqlens=cu,
        )  # fmt: skip
        per_token = lambda x: x[..., None] if isinstance(x, Tensor) else x  # noqa: E731
        parts = [(0, T)] if cu is None else list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))
        truths = []
        for n, (a, b) in enumerate(parts):
            one_state = state if state is None or cu is None else state[n : n + 1]
            cut = lambda x, a=a, b=b: None if x is None else x[:, a:b]  # noqa: E731
            truths.append(defining_sum(cut(q), cut(k), cut(v), cut(g), mode, one_state))
        o_true, final_true = (torch.cat(x, dim) for x, dim in zip(zip(*truths, strict=True), (1, 0), strict=True))
        o_true = per_token(gain) * o_true
        if residual is not None:
            o_true = o_true + per_token(ridge) * residual.repeat_interleave(o_true.shape[2] // residual.shape[2], 2)
        assert_close(o, o_true, 1e-11, "o")
        assert_close(final, final_true, 1e-11, "final state")

        do, dfinal = torch.randn_like(o), torch.randn_like(final)
        loss = lambda o, f: (used != "state") * (o * do).sum() + (used != "output") * (f * dfinal).sum()  # noqa: E731
        leaves = list({id(x): x for x in (q, k, v, g, gain, ridge, state) if isinstance(x, Tensor)}.values())
        grads = torch.autograd.grad(loss(o, final), leaves, allow_unused=True)
        truths = torch.autograd.grad(loss(o_true, final_true), leaves, allow_unused=True)
    finally:
        linear_attn.CHUNK, linear_attn.BLOCK_NUMBERS = old
    for x, grad, truth in zip(leaves, grads, truths, strict=True):
        zeros = torch.zeros_like(x)
        grad, truth = zeros if grad is None else grad, zeros if truth is None else truth
        assert float((grad - truth).abs().max() if x.numel() else 0) <= 1e-10 * (
            1 + float(truth.abs().max() if x.numel() else 0)
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(mode, packed, small_chunks):  # noqa: F811
    B, T = 1, 6
    leaf = lambda *s: torch.randn(*s, dtype=F64, requires_grad=True)  # noqa: E731
    q, k, v = leaf(B, T, 2, 2), leaf(B, T, 1, 2), leaf(B, T, 2, 3)
    g = (-torch.rand(B, T, 1, dtype=F64)).requires_grad_()
    cu = torch.tensor([0, 5, 5, 6]) if packed else None
    state = leaf(3 if packed else B, 2, 2, 3)
    gain, ridge = leaf(B, T, 2), leaf(B, T, 2)

    def function(q, k, v, g, gain, ridge, state):
        return la(
            q, k, v, g, gain=gain, ridge=ridge, residual=v, initial_state=state, output_final_state=True, mode=mode,
            cu_seqlens=cu,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, g, gain, ridge, state))


def test_adjoint_of_linear_attention_is_linear_attention():
    """dq = LA(do, v, k), dk = LA^r(v, do, q), dv = LA^r(k, q, do): the law the backward pass is built on."""
    q, k, v = (torch.randn(2, 70, 3, 4, dtype=F64, requires_grad=True) for _ in range(3))
    g = -torch.rand(2, 70, 3, dtype=F64)
    do = torch.randn(2, 70, 3, 4, dtype=F64)
    dq, dk, dv = torch.autograd.grad(la(q, k, v, g)[0], (q, k, v), do)
    assert_close(dq, la(do, v, k, g)[0])
    assert_close(dk, la(v, do, q, g, mode="reversed")[0])
    assert_close(dv, la(k, q, do, g, mode="reversed")[0])


def test_gate_gradient_is_a_reverse_cumsum():
    q, k, v = (torch.randn(1, 50, 2, 4, dtype=F64, requires_grad=True) for _ in range(3))
    g = (-torch.rand(1, 50, 2, dtype=F64)).requires_grad_()
    o, P = la(q, k, v, g, output_final_state=True)
    do, dP = torch.randn_like(o), torch.randn_like(P)
    dq, dk, dg = torch.autograd.grad((o, P), (q, k, g), (do, dP))
    dc = (q * dq).sum(-1) - (k * dk).sum(-1)
    dc[:, -1] += (P * dP).sum((-1, -2))
    assert_close(dg, dc.flip(1).cumsum(1).flip(1))


@pytest.mark.parametrize("which", range(3))
def test_one_float64_input_makes_all_sums_float64(which):
    x = [torch.randn(1, 70, 2, 4) for _ in range(3)]
    truth, state = la(*(y.double() for y in x), output_final_state=True)
    x[which] = x[which].double()
    o, mixed = la(*x, output_final_state=True, out_dtype=F64)
    assert_close(o, truth)
    assert_close(mixed, state)


def test_double_backward_is_refused():
    q = torch.randn(1, 5, 1, 2, dtype=F64, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(la(q, q, q)[0].sum(), q, create_graph=True)


def test_groups_are_never_repeated_in_memory(monkeypatch):
    """A grouped call allocates nothing as large as k repeated over query heads, and saves its inputs as they are."""
    HQ, T, K = 16, 4096, 16
    monkeypatch.setattr(linear_attn, "BLOCK_NUMBERS", 1)
    q, k, v = (x.requires_grad_() for x in (torch.randn(1, T, HQ, K), torch.randn(1, T, 1, K), torch.randn(1, T, 1, 2)))
    saved = []
    keep = lambda x: (saved.append(x.numel()), x)[1]  # noqa: E731
    with torch.profiler.profile(profile_memory=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            la(q, k, v)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert 0 < largest <= T * HQ * 2 * 4  # the output
    states = (T // 64 + 1) * K * 2
    assert sum(saved) <= sum(x.numel() for x in (q, k, v)) + states


def test_unknown_mode_is_named():
    q = torch.zeros(1, 2, 1, 2)
    with pytest.raises(ValueError, match="mode must be one of inclusive, strict, reversed; got 'causal'"):
        la(q, q, q, mode="causal")


@pytest.mark.parametrize("heads", [(2, 2, 4), (2, 1, 4), (4, 2, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_keys_as_their_own_values_with_gates_of_other_heads(mode, heads):
    """Both roles of k share one gradient, except where they have different head counts."""
    hq, hk, hg = heads
    torch.manual_seed(0)
    q, k = (torch.randn(1, 9, h, 3, dtype=F64, requires_grad=True) for h in (hq, hk))
    g = (-torch.rand(1, 9, hg, dtype=F64)).requires_grad_()
    o, truth = la(q, k, k, g, mode=mode)[0], defining_sum(q, k, k, g, mode, None)[0]
    do = torch.randn_like(o)
    for x, y in zip(torch.autograd.grad(o, [q, k, g], do), torch.autograd.grad(truth, [q, k, g], do), strict=True):
        assert_close(x, y)
