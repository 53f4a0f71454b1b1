"""The laws of the operators: all forms agree, splitting and packing change nothing, the past never sees the future."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hla
from hla import reference
from hla.ops import dispatch, linear_attn
from hla.ops.checks import check_call
from hla.ops.higher_order import compose, one_by_one
from hla.ops.linear_attn import chain
from tests.ops.cases import (  # noqa: F401
    CASES,
    F64,
    OPERATORS,
    Inputs,
    assert_close,
    assert_states_close,
    case,
    gradients,
    operator,
    small_chunks,
)


@case
def test_definition_equals_chunk_equals_recurrence(name, option, small_chunks):  # noqa: F811
    x = Inputs(name, option)
    truth = x.reference()
    chunk, state = x.chunk(output_final_state=True)
    recurrent, truth_state = x.recurrent(output_final_state=True)
    assert_close(chunk, truth)
    assert_close(recurrent, truth)
    assert_states_close(state, truth_state)


@case
def test_gradients_equal_those_of_the_definition(name, option):
    x = Inputs(name, option, B=1, T=70)
    grads = []
    for function in (getattr(hla, x.op), getattr(reference, x.op)):
        leaves = {n: y.clone().requires_grad_() for n, y in x.tensors().items()}
        q, k, v, kw = x.with_tensors(leaves)
        o = function(q, k, v, **kw)
        o = o[0] if isinstance(o, tuple) else o
        do = torch.randn(o.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        grads.append(gradients(o, leaves.values(), do))
    for n, grad, truth in zip(leaves, *grads, strict=True):
        assert_close(grad, truth, 1e-10, n)


@case
def test_gradcheck_with_states(name, option, small_chunks):  # noqa: F811
    """float64 gradcheck of outputs and final state in every input, the initial state included."""
    x = Inputs(name, option, B=1, T=6, HQ=2, HKV=1, K=2, V=2)
    _, state = x.chunk(output_final_state=True)
    fields = [n for n, y in zip(state._fields, state, strict=True) if y is not None and y.numel()]
    names = list(x.tensors())

    def function(*args):
        q, k, v, kw = x.with_tensors(dict(zip(names, args, strict=False)))
        initial = state._replace(**dict(zip(fields, args[len(names) :], strict=True)))
        o, final = getattr(hla, x.op)(q, k, v, initial_state=initial, output_final_state=True, **kw)
        return o, *(y for y in final if y is not None and y.numel())

    leaves = [*x.tensors().values(), *(getattr(state, n) for n in fields)]
    assert torch.autograd.gradcheck(function, [y.detach().clone().requires_grad_() for y in leaves])


@case
def test_prefill_in_pieces_equals_one_pass_equals_token_steps(name, option):
    x = Inputs(name, option, T=150)
    whole, truth = x.chunk(output_final_state=True)
    state, pieces = None, []
    for start, end in ((0, 64), (64, 65), (65, 65), (65, 148)):
        o, state = x.tokens(start, end).chunk(initial_state=state, output_final_state=True)
        pieces.append(o)
    for t in (148, 149):
        token = x.tokens(t, t + 1)
        at = lambda y: y[:, 0] if isinstance(y, Tensor) and y.dim() > 2 else y  # noqa: E731
        o, state = hla.step(
            x.op, at(token.q), at(token.k), at(token.v), state, **{n: at(y) for n, y in token.kw.items()}
        )
        pieces.append(o[:, None])
    assert_close(torch.cat(pieces, 1), whole)
    assert_states_close(state, truth)


@case
def test_packed_equals_separate(name, option, small_chunks):  # noqa: F811
    borders = [0, 0, 7, 8, 8, 29, 37]
    x = Inputs(name, option, B=1, T=37)
    leaves = {n: y.clone().requires_grad_() for n, y in x.tensors().items()}
    q, k, v, kw = x.with_tensors(leaves)
    x.q, x.k, x.v, x.kw = q, k, v, kw
    _, some = x.tokens(0, 5).chunk(output_final_state=True)
    N = len(borders) - 1
    initial = type(some)(*(None if y is None else torch.randn(N, *y.shape[1:], dtype=F64) for y in some))
    row = lambda n: type(some)(*(None if y is None else y[n : n + 1] for y in initial))  # noqa: E731
    parts = [
        x.tokens(a, b).chunk(initial_state=row(n), output_final_state=True)
        for n, (a, b) in enumerate(zip(borders, borders[1:], strict=False))
    ]
    truth = torch.cat([o for o, _ in parts], 1)
    for dtype in (torch.int32, torch.int64):
        cu = torch.tensor(borders, dtype=dtype)
        packed, state = x.chunk(initial_state=initial, output_final_state=True, cu_seqlens=cu)
        assert_close(packed, truth)
        assert_states_close(
            state,
            type(some)(*(None if y[0] is None else torch.cat(y) for y in zip(*(s for _, s in parts), strict=True))),
        )
    do = torch.randn_like(truth)
    grads, truths = (gradients(o, leaves.values(), do) for o in (packed, truth))
    for n, grad, grad_true in zip(leaves, grads, truths, strict=True):
        assert_close(grad, grad_true, 1e-11, n)


@case
def test_packed_recurrence_equals_packed_chunks(name, option):
    x = Inputs(name, option, B=1, T=19)
    packed = dict(cu_seqlens=torch.tensor([0, 0, 7, 8, 8, 19]), output_final_state=True)
    _, some = x.tokens(0, 5).chunk(output_final_state=True)
    initial = type(some)(*(None if y is None else torch.randn(5, *y.shape[1:], dtype=F64) for y in some))
    o, state = x.recurrent(initial_state=initial, **packed)
    truth, truth_state = x.chunk(initial_state=initial, **packed)
    assert_close(o, truth, 1e-11)
    assert_states_close(state, truth_state, 1e-11)


@case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causality_is_bit_equal(name, option, dtype):
    """Changing everything from token t on leaves the outputs before t as they were, bit for bit."""
    x = Inputs(name, option, T=140, dtype=dtype)
    x.kw = {n: y.float() if n == "g" else y for n, y in x.kw.items()}
    before, _ = x.chunk()
    for t in (0, 1, 63, 64, 100):
        y = Inputs(name, option, T=140, dtype=dtype)
        y.kw = {n: z.float() if n == "g" else z for n, z in y.kw.items()}
        for z in y.tensors().values():
            if z.dim() > 2:  # not what has no time: nodes per head
                z[:, t:] *= 1.7
        after, _ = y.chunk()
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


@operator
@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 500])
def test_any_length(name, T):
    x = Inputs(name, "g" if name != "linear_attn" else "plain", T=T)
    o, state = x.chunk(output_final_state=True)
    recurrent, truth = x.recurrent(output_final_state=True)
    assert_close(o, recurrent, 1e-11)
    assert_states_close(state, truth, 1e-11)


@given(
    name=st.sampled_from(list(OPERATORS)),
    B=st.integers(1, 3),
    T=st.integers(0, 90),
    HKV=st.integers(1, 3),
    group=st.integers(1, 3),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    option=st.sampled_from(["plain", "g", "g,p=k,per token", "ridge,gain per token"]),
    seed=st.integers(0, 10**6),
)
def test_any_shape(name, B, T, HKV, group, K, V, option, seed):
    if (name, option) not in CASES:
        option = "g"
    x = Inputs(name, option, B=B, T=T, HQ=HKV * group, HKV=HKV, K=K, V=V, seed=seed)
    assert_close(x.chunk()[0], x.reference(), 1e-10)


@operator
def test_strided_views_give_the_same(name):
    """Slices of one fused projection are taken as they are."""
    x = Inputs(name, T=70, HQ=2, HKV=2, K=4, V=4)
    fused = torch.cat([x.q, x.k, x.v], -1).flatten(2)
    q, k, v = fused.view(2, 70, 2, 12).split(4, -1)
    assert not q.is_contiguous()
    o = getattr(hla, x.op)(q, k, v, **x.kw)[0]
    assert torch.equal(o, x.chunk()[0])


@operator
def test_deterministic(name):
    x = Inputs(name, "g" if name != "linear_attn" else "plain", T=200, dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaves = {n: y.clone().requires_grad_() for n, y in x.tensors().items()}
        q, k, v, kw = x.with_tensors(leaves)
        o, _ = getattr(hla, x.op)(q, k, v, **kw)
        runs.append([o, *gradients(o.square().sum(), leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# -- what the operators are (sections of the design: identities between them) ----------------------------------------


def positive_beta(k: Tensor) -> Tensor:
    return torch.rand(k.shape[:3], dtype=k.dtype)


def test_orders_of_hla_n_and_ahla_are_the_named_operators():
    x = Inputs("hla2", "g", T=50)
    q, k, v, kw = x.q, x.k, x.v, x.kw
    assert_close(hla.hla_n(q, k, v, order=1, **kw)[0], hla.linear_attn(q, k, v, **kw)[0])
    assert_close(hla.hla_n(q, k, v, order=2, **kw)[0], hla.hla2(q, k, v, **kw)[0])
    assert_close(hla.hla_n(q, k, v, order=3, **kw)[0], hla.hla3(q, k, v, **kw)[0])
    assert_close(hla.ahla(q, k, v, order=1, **kw)[0], hla.linear_attn(q, k, v, **kw)[0])
    assert_close(hla.ahla(q, k, v, order=2, **kw)[0], hla.ahla(q, k, v, **kw)[0])


def test_first_order_limits():
    """hla2(gain=0, ridge=1, p=k) and ahla(gain=0, ridge=1) are first-order linear attention."""
    x = Inputs("hla2", "g", T=50)
    truth, _ = hla.linear_attn(x.q, x.k, x.v, **x.kw)
    assert_close(hla.hla2(x.q, x.k, x.v, p="k", gain=0.0, ridge=1.0, **x.kw)[0], truth)
    assert_close(hla.ahla(x.q, x.k, x.v, gain=0.0, ridge=1.0, **x.kw)[0], truth)


def test_paper_state_equals_compact_state():
    """Without decay F_t = S_t C_t - G_t (Theorem 3.1), with the paper's ridge S + lambda I (Algorithm 1)."""
    x = Inputs("hla2", B=1, T=20, HQ=1, HKV=1)
    ridge, K = 0.2, x.q.shape[-1]
    S, C, G = torch.zeros(K, K, dtype=F64), torch.zeros(K, 5, dtype=F64), torch.zeros(K, 5, dtype=F64)
    outputs = []
    for q, k, v in zip(x.q[0, :, 0], x.k[0, :, 0], x.v[0, :, 0], strict=True):
        G = G + torch.outer(k, k @ C)
        S, C = S + torch.outer(k, k), C + torch.outer(q, v)
        outputs.append(q @ ((S + ridge * torch.eye(K, dtype=F64)) @ C - G))
    o, state = hla.hla2(x.q, x.k, x.v, ridge=ridge, scale=1.0, output_final_state=True)
    assert_close(o[0, :, 0], torch.stack(outputs))
    assert_close(state.S[0, 0], S)
    assert_close(state.F[0, 0], S @ C - G + ridge * C)


def test_protecting_form_writes_along_decorrelated_keys():
    """hla2(p=k, gain=-b/scale, ridge=1 + b|k|^2): k~_j = k_j - b_j S_{j-1} k_j."""
    x = Inputs("hla2", B=1, T=30, HQ=1, HKV=1)
    b, scale = positive_beta(x.k), 0.7
    ridge = 1 + b * x.k.square().sum(-1)
    o, _ = hla.hla2(x.q, x.k, x.v, p="k", gain=-b / scale, ridge=ridge, scale=scale)
    S = torch.zeros(3, 3, dtype=F64)
    keys = []
    for k, b_t in zip(x.k[0, :, 0], b[0, :, 0], strict=True):
        keys.append(k - b_t * S @ k)
        S = S + torch.outer(k, k)
    keys = torch.stack(keys)[None, :, None]
    assert_close(o, hla.linear_attn(x.q, keys, x.v, scale=scale)[0])


@pytest.mark.parametrize("gated", [False, True])
def test_overwriting_form_is_the_first_term_of_the_delta_rule(gated):
    """The remainder falls by 100 when |k| falls by 10."""
    x = Inputs("ahla", B=1, T=30, HQ=1, HKV=1)
    beta, g = positive_beta(x.k), -0.1 * torch.rand(1, 30, 1, dtype=F64) if gated else None

    def relative_remainder(size: float) -> float:
        k = size * x.k
        P, outputs = torch.zeros(3, 5, dtype=F64), []
        for t in range(30):
            q_t, k_t, v_t, b_t = x.q[0, t, 0], k[0, t, 0], x.v[0, t, 0], beta[0, t, 0]
            P = P if g is None else g[0, t, 0].exp() * P
            P = P + b_t * torch.outer(k_t, v_t - P.T @ k_t)
            outputs.append(P.T @ q_t)
        truth = torch.stack(outputs)[None, :, None]
        o, _ = hla.ahla(
            x.q, k, beta[..., None] * x.v, p="k", gain=-beta, ridge=1 + beta * k.square().sum(-1), scale=1.0, g=g
        )
        first, _ = hla.linear_attn(x.q, k, beta[..., None] * x.v, scale=1.0, g=g)
        return float((o - truth).norm() / (first - truth).norm())

    # The first-order error is O(|k|^2) of the output, what is left here O(|k|^4): their ratio falls by 100.
    assert relative_remainder(0.01) == pytest.approx(relative_remainder(0.1) / 100, rel=0.3)


def test_non_causal_linear_attention_reads_the_whole_sequence():
    x = Inputs("linear_attn", T=50)
    q, k, v = x.q, x.k.repeat_interleave(2, 2), x.v.repeat_interleave(2, 2)
    weights = torch.einsum("bthk,bjhk->bhtj", q, k) * 3**-0.5
    truth = torch.einsum("bhtj,bjhv->bthv", weights, v)
    assert_close(hla.linear_attn(x.q, x.k, x.v, causal=False)[0], truth)
    normalized = truth / (weights.sum(-1).transpose(1, 2)[..., None] + 0.5)
    assert_close(hla.linear_attn(x.q, x.k, x.v, causal=False, normalize=True, eps=0.5)[0], normalized)


def test_non_causal_output_has_the_dtype_of_v():
    x = Inputs("linear_attn", T=5, dtype=torch.bfloat16)
    assert hla.linear_attn(x.q, x.k, x.v, causal=False)[0].dtype == torch.bfloat16


def test_non_causal_packed_equals_separate():
    x = Inputs("linear_attn", B=1, T=150)
    borders = [0, 70, 70, 150]
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
    packed, _ = hla.linear_attn(*leaves, causal=False, cu_seqlens=torch.tensor(borders))
    parts = [
        hla.linear_attn(*(y[:, a:b] for y in leaves), causal=False)[0]
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    truth = torch.cat(parts, 1)
    assert_close(packed, truth)
    do = torch.randn_like(truth)
    for a, b in zip(torch.autograd.grad(packed, leaves, do), torch.autograd.grad(truth, leaves, do), strict=True):
        assert_close(a, b)


# -- low precision ---------------------------------------------------------------------------------------------------


# fp16 has no range for the orders above 3 (outputs grow as t^order), so they are left out here.
LOW_PRECISION = [
    (n, o)
    for n, o in CASES
    if o in ("plain", "g", "g,p=k,per token", "g,normalize,ridge") and n in ("linear_attn", "hla2", "ahla", "hla3")
]


@pytest.mark.parametrize("name,option", LOW_PRECISION)
@pytest.mark.parametrize(
    "dtype,forward,backward", [(torch.bfloat16, 5e-3, 1e-2), (torch.float16, 1e-3, 2e-3), (torch.float32, 1e-5, 1e-5)]
)
def test_error_budget_against_float64(name, option, dtype, forward, backward):
    """Error against the float64 truth of the same rounded inputs: the rounding of output and gradients, no more."""
    scale = 0.5
    low = Inputs(name, option, B=1, T=300, K=16, V=8)
    high = Inputs(name, option, B=1, T=300, K=16, V=8)
    results = []
    for x, cast in ((low, dtype), (high, F64)):
        tensors = {n: (y * scale if n in "qkp" else y).to(dtype).to(cast) for n, y in x.tensors().items() if n != "g"}
        if "g" in x.kw:
            tensors["g"] = x.kw["g"].float().to(torch.float32 if cast != F64 else F64)
        leaves = {n: y.clone().requires_grad_() for n, y in tensors.items()}
        q, k, v, kw = x.with_tensors(leaves)
        o, _ = getattr(hla, x.op)(q, k, v, **kw)
        do = torch.randn(o.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append((o, gradients(o, leaves.values(), do.to(cast))))
    (o, grads), (o_true, grads_true) = results
    assert o.dtype == dtype
    norm = lambda a, b: float((a.double() - b).norm() / b.norm().clamp(min=1e-30))  # noqa: E731
    assert norm(o, o_true) <= forward
    for n, a, b in zip(leaves, grads, grads_true, strict=True):
        assert a.dtype == (torch.float32 if n == "g" else dtype)
        assert norm(a, b) <= backward, n


def test_states_are_float32_for_low_precision_inputs():
    for name in OPERATORS:
        x = Inputs(name, dtype=torch.bfloat16)
        _, state = x.chunk(output_final_state=True)
        assert all(y is None or y.dtype == torch.float32 for y in state)


@case
def test_states_of_low_precision_inputs_are_not_rounded(name, option):
    """k~, v~, gain times scale and the states stay float32 whatever the dtype of the inputs."""
    x = Inputs(name, option, T=70, dtype=torch.bfloat16)
    x.kw = {n: y.float() if n == "g" else y for n, y in x.kw.items()}
    o, state = x.chunk(output_final_state=True)
    x.q, x.k, x.v, x.kw = x.with_tensors({n: y.float() for n, y in x.tensors().items()})
    o_true, truth = x.chunk(output_final_state=True)
    assert_states_close(state, truth, 1e-6)
    assert torch.equal(o, o_true.bfloat16())  # rounded once, at the very end


@pytest.mark.parametrize("name", ["linear_attn", "hla2", "hla3"])
@pytest.mark.parametrize("reset", [-50.0, -1e4, -1e30])
@pytest.mark.parametrize("packed", [False, True])
def test_resets_lose_no_digits(name, reset, packed):
    """A reset in the middle of a chunk must not cost what follows the digits of its decays, nor of its gradients."""
    x = Inputs(name, "g", B=1, T=150, dtype=torch.float32)
    x.kw["g"][:, ::10] = reset
    x.kw |= dict(cu_seqlens=torch.tensor([0, 67, 150])) if packed else {}
    results = []
    for cast in (torch.float32, F64):
        leaves = {n: y.detach().to(cast).requires_grad_() for n, y in x.tensors().items() if n != "cu_seqlens"}
        q, k, v, kw = x.with_tensors(leaves)
        o, state = getattr(hla, x.op)(q, k, v, output_final_state=True, **kw)
        if cast == F64:  # the truth is the recurrence: it has no cumulated decays
            o, state = dispatch(x.op, "recurrent", "torch", q.device)(
                check_call(x.op, q, k, v, output_final_state=True, **kw)
            )
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(cast)
        results.append([o, *(y for y in state if y is not None), *gradients(o, leaves.values(), do)])
    for a, b in zip(*results, strict=True):
        assert_close(a.double(), b, 5e-6)


def test_an_empty_call_returns_a_state_of_its_own():
    """Writing into the final state of a call without tokens leaves the initial state as it was."""
    x = Inputs("hla3", T=5)
    _, initial = x.chunk(output_final_state=True)
    _, final = x.tokens(0, 0).chunk(initial_state=initial, output_final_state=True)
    assert_states_close(final, initial, 0.0)
    assert all(a is None or a.data_ptr() != b.data_ptr() for a, b in zip(final, initial, strict=True))


@operator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(name, use_reentrant):
    x = Inputs(name, "g", T=70)
    grads = []
    for run in (lambda f, *y: f(*y), partial(checkpoint, use_reentrant=use_reentrant)):
        leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
        o = run(lambda q, k, v: getattr(hla, x.op)(q, k, v, **x.kw)[0], *leaves)
        o.square().sum().backward()
        grads.append([y.grad for y in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@operator
def test_torch_compile_fullgraph_without_gradients(name):
    """Serving: no argument requires a gradient, so the primitive is traced as a plain function."""
    x = Inputs(name, "g", B=1, T=70, dtype=torch.float32)

    def call(q, k, v, g):
        return getattr(hla, x.op)(q, k, v, **(x.kw | dict(g=g)), output_final_state=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (o, state), (truth, truth_state) = (f(x.q, x.k, x.v, x.kw["g"]) for f in (compiled, call))
    assert_close(o, truth, 1e-6)
    assert_states_close(state, truth_state, 1e-6)


def test_torch_compile_with_dynamic_lengths():
    compiled = torch.compile(lambda q, k, v: hla.hla2(q, k, v)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (5, 70, 129):
        q, k, v = (torch.randn(1, T, 2, 4) for _ in range(3))
        assert_close(compiled(q, k, v), hla.hla2(q, k, v)[0], 1e-5)


def test_torch_compile_fullgraph():
    q, k, v = (torch.randn(1, 70, 2, 4, requires_grad=True) for _ in range(3))
    g = -torch.rand(1, 70, 2)

    def loss(q, k, v, g):
        return hla.hla2(q, k, v, g=g)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    truth = torch.autograd.grad(loss(q, k, v, g), (q, k, v))
    for a, b in zip(torch.autograd.grad(compiled(q, k, v, g), (q, k, v)), truth, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("name", ["hla_q4", "hla3"])
def test_torch_compile_fullgraph_from_a_state(name):
    x = Inputs(name, "g", B=1, T=20, dtype=torch.float32)
    _, state = getattr(hla, x.op)(x.q, x.k, x.v, **x.kw, output_final_state=True)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]

    def run(q, k, v):
        return getattr(hla, x.op)(q, k, v, **x.kw, initial_state=state)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    o, truth = (f(*leaves) for f in (compiled, run))
    for a, b in zip(*(gradients(y, leaves, torch.ones_like(y)) for y in (o, truth)), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("name", ["linear_attn", "hla3"])
def test_autocast_changes_no_bit(name):
    """The operators keep their float32 sums under autocast: in the chunk form, its backward and the token step."""
    x = Inputs(name, T=100, K=16, V=8, dtype=torch.float32)

    def results() -> list[Tensor]:
        leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
        o, state = getattr(hla, x.op)(*leaves, output_final_state=True, **x.kw)
        stepped, _ = hla.step(x.op, x.q[:, 0], x.k[:, 0], x.v[:, 0], state, **x.kw)
        return [o, stepped, *gradients(o, leaves, torch.ones_like(o))]

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(results(), plain, strict=True))


@case
def test_chain_equals_one_call_of_the_primitive_per_stage(name, option):
    """The chain through all stages of a block, and its gradient, equal stage after stage over the whole sequence."""
    x = Inputs(name, option, B=1, T=70)
    results = []
    for run in (chain, one_by_one):
        leaves = {n: y.clone().requires_grad_() for n, y in x.tensors().items()}
        q, k, v, kw = x.with_tensors(leaves)
        o, state = compose(check_call(x.op, q, k, v, output_final_state=True, **kw), run)
        do = torch.randn(o.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        loss = (o * do).sum() + sum(y.sin().sum() for y in state if y is not None)
        results.append([o, *(y for y in state if y is not None), *gradients(loss, leaves.values())])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("name", ["hla2", "ahla", "hla3"])
def test_one_tensor_may_be_both_ridge_and_gain(name):
    x = Inputs(name, "ridge,gain per token")
    x.kw["gain"] = x.kw["ridge"]
    assert_close(x.chunk()[0], x.reference())


def test_block_size_changes_no_result(monkeypatch):
    x = Inputs("hla3", "g", T=300)
    truth, _ = x.chunk()
    monkeypatch.setattr(linear_attn, "BLOCK_NUMBERS", 1)
    assert_close(x.chunk()[0], truth)
