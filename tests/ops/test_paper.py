"""Statements of the paper (arXiv 2510.27258) that the tests of the operators do not cover; `docs/paper.md` lists all.

The smallest counterexamples use ``d = dv = 1`` and binary fractions, so that their numbers are exact.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hla
from hla import published, reference
from hla.ops.published_scan import (
    AHLATuple,
    HLA2Tuple,
    HLA3Tuple,
    ahla_concat,
    ahla_token,
    hla2_concat,
    hla2_decayed_concat,
    hla2_decayed_token,
    hla2_token,
    hla3_concat,
    hla3_token,
)
from hla.ops.scan import exclusive_scan
from hla.ops.segments import summarize
from hla.ops.state import state_nbytes, zeros
from tests.ops.cases import F64, assert_close
from tests.ops.test_scan import (
    GAMMA,
    Draws,
    PrintedHLA2,
    algorithm_2,
    algorithm_3,
    left_fold,
    off,
    outer,
    printed_ahla_concat,
    printed_hla2_concat,
    printed_hla2_outputs,
    right_fold,
    tree_fold,
    vm,
)


def inputs(T: int, K=3, V=5) -> list[Tensor]:
    """q, k ``[T, K]`` and v ``[T, V]``."""
    return [torch.randn(T, n, dtype=F64) for n in (K, K, V)]


def batched(*x: Tensor) -> list[Tensor]:
    """``[T, D]`` as ``[1, T, 1, D]``."""
    return [y[None, :, None] for y in x]


def scalars(*x: list[float]) -> list[Tensor]:
    """Sequences of numbers as ``[1, T, 1, 1]``."""
    return [torch.tensor(y, dtype=F64).view(1, -1, 1, 1) for y in x]


def numbers(state) -> int:
    return sum(x.numel() for x in state if x is not None)


def matmul_flops(function, *args) -> int:
    """Floating-point operations in matrix products (two for each multiply-add); elementwise ones are not counted."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


# -- Section 3 ---------------------------------------------------------------------------------------------------------


def test_unmasked_second_order_factorises():
    """``T2 = (Q K^T)(Q K^T)^T = Q (K^T K) Q^T``; eq. 3.1 is its row t for the sequence that ends at t."""
    q, k, v = inputs(9)
    T2 = (q @ k.T) @ (q @ k.T).T
    assert_close(T2, q @ (k.T @ k) @ q.T)
    assert_close(T2[4, 7], q[4] @ (k.T @ k) @ q[7])
    o = published.hla2_prefix(*batched(q, k, v))[0, :, 0]
    for t in range(9):
        A = q[: t + 1] @ k[: t + 1].T
        assert_close(o[t], (A @ A.T @ v[: t + 1])[-1])
    assert off((T2 @ v)[None, :8], o[None, :8]).least > 0.5  # no earlier row of T2 V is: they read later tokens


def test_order_2_does_not_see_the_sign_of_the_keys():
    """So a first-order linear attention, which does, is no special case of it on the same q, k, v."""
    q, k, v = batched(*inputs(20))
    for operator in (published.hla2, published.hla2_prefix, published.ahla, lambda *x: hla.hla2(*x)[0]):
        assert torch.equal(operator(q, -k, v), operator(q, k, v))
    assert torch.equal(hla.linear_attn(q, -k, v)[0], -hla.linear_attn(q, k, v)[0])
    assert_close(published.hla3(q, -k, v), -published.hla3(q, k, v))
    assert hla.linear_attn(q, k, v)[0].norm() > 1


def test_masked_matrix_reads_the_moment_at_the_smaller_index():
    q, k, _ = inputs(8)
    WW = (q @ k.T).tril() @ (q @ k.T).tril().T
    for t in range(8):
        for j in range(8):
            past = k[: min(t, j) + 1]
            assert_close(WW[t, j], q[t] @ (past.T @ past) @ q[j], 1e-11)


def test_identity_behind_theorem_3_1():
    """Eq. 3.5: ``sum_j S_j q_j v_j^T = S_t C_t - G_t``, and ``sum_j S_j q_j = S_t m_t - h_t``."""
    q, k, v = inputs(11)
    v = torch.cat([v, torch.ones(11, 1, dtype=F64)], 1)  # the last column of C and G is m and h
    S = outer(k, k).cumsum(0)
    C = outer(q, v).cumsum(0)
    for t in range(11):
        masked = sum(S[j] @ outer(q[j], v[j]) for j in range(t + 1))
        zero = torch.zeros(3, 6, dtype=F64)
        G = sum((outer(k[i], k[i]) @ C[i - 1] for i in range(1, t + 1)), zero)
        I2 = sum((outer(k[i], k[i]) @ outer(q[j], v[j]) for i in range(t + 1) for j in range(i)), zero)
        assert_close(I2, G)
        assert_close(S[t] @ C[t] - G, masked)


def test_outputs_without_decay_grow_with_length():
    """``q = k = v = 1``: the number of terms, ``t (t + 1) / 2`` with the mask and ``t^2`` without."""
    ones = scalars([1.0] * 50, [1.0] * 50, [1.0] * 50)
    t = torch.arange(1, 51, dtype=F64)
    assert_close(published.hla2(*ones)[0, :, 0, 0], t * (t + 1) / 2)
    assert_close(published.ahla(*ones)[0, :, 0, 0], t * (t + 1) / 2)
    assert_close(published.hla2_prefix(*ones)[0, :, 0, 0], t * t)


def test_a_denominator_can_be_zero_without_decay():
    """Two tokens; values 0 and 1 become 1 / eps: eps > 0 bounds a denominator of one sign only."""
    q, k, v = scalars([1.0, -1.0], [1.0, 0.0], [0.0, 1.0])
    assert published.hla2(q, k, torch.ones_like(v))[0, 1, 0, 0] == 0.0
    o = published.hla2(q, k, v, normalize=True, eps=1e-6)
    assert o[0, 1, 0, 0].item() == pytest.approx(1e6)


# -- Figures 1B and 2B -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [32, 64])
def test_figures_1b_and_2b_cost_n_cubed_as_drawn(N):
    """And ``N^2`` with the transformed keys ``W K``, or with values that go through A twice."""
    q, k, v = inputs(N, 4, 6)
    products = {  # name -> (as drawn, in N^2, multiply-adds of the latter)
        "1B": (
            lambda: ((q @ k.T).tril() @ (q @ k.T).tril().T).tril() @ v,
            lambda: (q @ ((q @ k.T).tril() @ k).T).tril() @ v,
            N * N * (4 + 4 + 4 + 6),
        ),
        "2B": (
            lambda: ((q @ k.T).tril() @ (q @ k.T).tril()).tril() @ v,
            lambda: (q @ k.T).tril() @ ((q @ k.T).tril() @ v),
            N * N * (4 + 4 + 6 + 6),
        ),
    }
    for name, (drawn, cheap, cost) in products.items():
        operator = reference.hla2 if name == "1B" else reference.ahla
        truth = operator(*batched(q, k, v), scale=1.0)[0, :, 0]
        assert_close(drawn(), truth)
        assert_close(cheap(), truth)
        assert matmul_flops(drawn) == 2 * (N**3 + N * N * (4 + 4 + 6))
        assert matmul_flops(cheap) == 2 * cost


@pytest.mark.parametrize("C", [4, 8])
def test_chunk_form_of_figure_1c_and_its_cost(C):
    """Corrected, in ``N C (5 d + 2 dv) + N (2 d^2 + 5 d dv)`` multiply-adds: the state is read by every token."""
    N, K, V = 32, 4, 6
    q, k, v = inputs(N, K, V)

    def chunks() -> Tensor:
        S, moment, G = torch.zeros(K, K, dtype=F64), torch.zeros(K, V, dtype=F64), torch.zeros(K, V, dtype=F64)
        outputs = []
        for x, y, z in zip(q.split(C), k.split(C), v.split(C), strict=True):
            u = x @ S
            weights = (x @ ((x @ y.T).tril() @ y).T + u @ x.T).tril()
            outputs.append(u @ moment - x @ G + weights @ z)
            G = G + y.T @ (y @ moment + (y @ x.T).tril(-1) @ z)
            S, moment = S + y.T @ y, moment + x.T @ z
        return torch.cat(outputs)

    assert_close(chunks(), published.hla2(*batched(q, k, v))[0, :, 0])
    assert matmul_flops(chunks) == 2 * (N * C * (5 * K + 2 * V) + N * (2 * K * K + 5 * K * V))


# -- Section 4 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_unmasked_sums_are_a_monoid_with_and_without_decay(gamma):
    """Section 4.1, and the first decayed concatenation of section 4.2, which is right as printed."""
    q, k, v = inputs(13)

    def concat(a, b):
        S, C, m, rho = a
        return (
            b[3][..., None, None] * S + b[0],
            b[3][..., None, None] * C + b[1],
            b[3][..., None] * m + b[2],
            rho * b[3],
        )

    tokens = outer(k, k), outer(q, v), q, torch.full((13,), gamma, dtype=F64)
    zero = torch.zeros((), dtype=F64)
    before = exclusive_scan(tokens, concat, (zero, zero, zero, torch.ones((), dtype=F64)))
    S, C, m, _ = concat(before, tokens)
    u = vm(q, S)
    num, den = vm(u, C), (u * m).sum(-1, keepdim=True)
    prefix = lambda **kw: published.hla2_prefix(*batched(q, k, v), gamma=gamma, form="recurrent", **kw)  # noqa: E731
    assert_close(num, prefix()[0, :, 0])
    assert_close(num / (den + 0.5), prefix(normalize=True, eps=0.5)[0, :, 0])


def token_tuples(make, T: int, **kw) -> list:
    """T tokens with ``q = k = v = 1``."""
    one = torch.ones(1, 1, dtype=F64)
    return [make(one, one, one, **kw) for _ in range(T)]


def test_smallest_counterexample_to_the_decayed_concatenation_of_order_2():
    """gamma = 1/2 and q = k = v = 1. Two tokens show that it isn't the recurrence, three that it isn't associative."""
    tokens = token_tuples(hla2_decayed_token, 3, gamma=0.5)
    a, b, c = (PrintedHLA2(*(getattr(x, name) for name in PrintedHLA2._fields)) for x in tokens)
    printed, concat = printed_hla2_concat, lambda x, y: hla2_decayed_concat(x, y, 0.5)
    assert printed(a, b).G.item() == printed(a, b).h.item() == 0.5
    assert printed(printed(a, b), c).G.item() == 1.0
    assert printed(a, printed(b, c)).G.item() == 0.875
    a_, b_, c_ = tokens
    assert concat(a_, b_).G.item() == 1.0  # G_2 = k k^T C_1
    assert concat(concat(a_, b_), c_).G.item() == concat(a_, concat(b_, c_)).G.item() == 2.0
    # Outputs: o_t = S_t C_t - G_t
    ones = scalars([1.0] * 3, [1.0] * 3, [1.0] * 3)
    assert published.hla2(*ones, gamma=0.5, form="recurrent").flatten().tolist() == [1.0, 1.25, 1.0625]
    I2 = printed(a, b)  # the proof of Theorem 4.1: P_t with T_t
    assert (I2.S @ I2.C - I2.G).item() == 1.75
    S, C, G = 0.5 * I2.S + 1, 0.5 * I2.C + 1, 0.5 * I2.G + I2.C  # Algorithm 1, lines 5 and 6, on the printed prefix
    assert (S @ C - G).item() == 1.3125


def test_smallest_counterexample_to_the_decayed_concatenation_of_ahla():
    """gamma = 1/2 and q = k = v = 1, three tokens: right from the left, wrong when B has two tokens."""
    a, b, c = token_tuples(ahla_token, 3, gamma=0.5)
    printed = printed_ahla_concat
    assert printed(printed(a, b), c).E.item() == 2.75
    assert printed(a, printed(b, c)).E.item() == 2.625
    assert ahla_concat(ahla_concat(a, b), c).E.item() == ahla_concat(a, ahla_concat(b, c)).E.item() == 2.75
    ones = scalars([1.0] * 3, [1.0] * 3, [1.0] * 3)
    assert published.ahla(*ones, gamma=0.5, form="recurrent").flatten()[-1].item() == 2.75


def percent(x: Tensor, truth: Tensor) -> list[int]:
    return [round(100 * y) for y in off(x, truth)]


@pytest.mark.parametrize(
    "fold,G,h,E,n",
    [
        (left_fold, [10, 10, 10], [10, 10, 10], [0, 0, 0], [0, 0, 0]),
        (tree_fold, [13, 24, 37], [10, 24, 62], [3, 15, 41], [2, 14, 51]),
        (right_fold, [14, 34, 58], [12, 36, 70], [6, 23, 73], [3, 22, 122]),
    ],
)
def test_measured_misses_of_the_printed_concatenations(fold, G, h, E, n):
    """Least, median and most of 200 draws, in percent."""
    draws = Draws()
    order_2, ahla = fold(printed_hla2_concat, draws.printed), fold(printed_ahla_concat, draws.ahla)
    assert percent(order_2.G, draws.hla2_state.G) == pytest.approx(G, abs=1)
    assert percent(order_2.h, draws.hla2_state.h) == pytest.approx(h, abs=1)
    assert percent(ahla.E, draws.E) == pytest.approx(E, abs=1)
    assert percent(ahla.n, draws.n) == pytest.approx(n, abs=1)


def test_measured_misses_of_whole_scans():
    """Outputs: order 2 (printed scan, then Algorithm 1), AHLA (printed scan), section 7.3's decay at third order."""
    draws = Draws()
    assert percent(printed_hla2_outputs(draws), draws.hla2_outputs) == pytest.approx([2, 7, 44], abs=1)
    zero, q = torch.zeros((), dtype=F64), torch.stack([x[0] for x in draws.tokens])
    tokens = AHLATuple(*(torch.stack(x) for x in zip(*draws.ahla, strict=True)))
    before = exclusive_scan(tokens, printed_ahla_concat, AHLATuple(*[zero] * 5, torch.ones_like(zero)))
    o = vm(q, printed_ahla_concat(before, tokens).E).permute(1, 2, 0, 3)
    assert percent(o, algorithm_2(*draws.qkv, GAMMA)) == pytest.approx([1, 5, 17], abs=1)
    state, outputs = None, []
    for q, k, v in draws.tokens:
        token = hla3_token(q, k, v)
        state = token if state is None else hla3_concat(HLA3Tuple(*(GAMMA * x for x in state)), token)
        outputs.append(vm(q, state.F))
    truth = algorithm_3(*draws.qkv, GAMMA)
    assert percent(torch.stack(outputs, 2), truth) == pytest.approx([12, 107, 298], abs=2)


def test_the_backward_scan_is_one_of_pairs():
    """A reverse scan of (segment, cotangent): the adjoint of ``a + b`` in a depends on the segment b and is linear.

    Two such adjoints compose to that of the concatenated segment. The cotangent of token t is then read off with the
    forward prefix before t.
    """
    n = 11
    tokens = HLA2Tuple(*(x.requires_grad_() for x in hla2_token(*inputs(n))))
    weights = HLA2Tuple(*(torch.randn_like(x) for x in tokens))
    row = lambda t: HLA2Tuple(*(x[t] for x in tokens))  # noqa: E731
    state, loss = None, torch.zeros((), dtype=F64)
    for t in range(n):
        state = row(t) if state is None else hla2_concat(state, row(t))
        loss = loss + sum((w[t] * x).sum() for w, x in zip(weights, state, strict=True))
    truth = torch.autograd.grad(loss, tokens)

    add = lambda x, y: HLA2Tuple(*(a + b for a, b in zip(x, y, strict=True)))  # noqa: E731
    mv = lambda A, x: (A @ x[..., None])[..., 0]  # noqa: E731

    def through(segment, d):  # from the cotangent of "x + segment" to that of x
        return d._replace(C=d.C + segment.S.mT @ d.G, m=d.m + mv(segment.S.mT, d.h))

    def combine(later, earlier):
        return hla2_concat(earlier[0], later[0]), add(earlier[1], through(earlier[0], later[1]))

    with torch.no_grad():
        flip = lambda x: HLA2Tuple(*(y.flip(0) for y in x))  # noqa: E731
        nothing = HLA2Tuple(*(torch.zeros((), dtype=F64) for _ in tokens))
        pairs = flip(tokens), flip(through(tokens, weights))
        _, after = exclusive_scan(pairs, combine, (nothing, nothing))
        d = add(weights, flip(after))
        before = exclusive_scan(tokens, hla2_concat, nothing)
        S = d.S + d.G @ before.C.mT + outer(d.h, before.m)
    for x, y in zip(d._replace(S=S), truth, strict=True):
        assert_close(x, y, 1e-12)


@pytest.mark.parametrize("gamma", [0.9, 0.5])
def test_decay_bounds_the_spectrum_of_the_key_moment(gamma):
    """``|S_t| <= max |k|^2 / (1 - gamma)``, reached in the limit by equal keys; without decay it grows as t."""
    k = torch.nn.functional.normalize(torch.randn(400, 3, dtype=F64), dim=-1)
    equal = k[:1].expand(400, 3)
    sizes = []
    for keys, decay in ((k, gamma), (equal, gamma), (equal, 1.0)):
        S = torch.zeros(3, 3, dtype=F64)
        for x in keys:
            S = decay * S + outer(x, x)
        sizes.append(float(torch.linalg.matrix_norm(S, 2)))
    bound = 1 / (1 - gamma)
    assert sizes[0] < bound and sizes[1] == pytest.approx(bound) and sizes[2] == pytest.approx(400)


# -- Counts: sections 1, 5, 6.1 and 7.3 --------------------------------------------------------------------------------

d, dv = 6, 10


def test_state_of_one_head():
    """The paper's tuples, in their own numbers, and the compact states of `hla` (times 4 bytes)."""
    q, k, v = (torch.zeros(n) for n in (d, d, dv))
    assert numbers(hla2_token(q, k, v)) == d * d + 2 * d * dv + 2 * d
    tuple_2 = ahla_token(q, k, v, 0.9)
    assert numbers((tuple_2.P, tuple_2.m, tuple_2.E, tuple_2.n)) == 2 * d * dv + 2 * d
    assert tuple_2.R.numel() == d * d  # in the scan only
    for op, plain, normalized in (
        ("hla2", d * d + d * dv, d),
        ("ahla", 2 * d * dv, 2 * d),
        ("hla3", d * d + 2 * d * dv, 2 * d),
    ):
        assert numbers(zeros(op, 1, 1, 1, d, dv)) == plain
        state = zeros(op, 1, 1, 1, d, dv, normalize=True)
        assert numbers(state) == plain + normalized and state_nbytes(state) == 4 * numbers(state)


@pytest.mark.parametrize("h", [1, 8])
def test_state_with_shared_keys_and_values(h):
    """Section 5.2: ``d^2 + h d dv`` instead of ``h (d^2 + d dv)``; AHLA shares P too."""
    assert numbers(zeros("hla2", 1, h, 1, d, dv)) == d * d + h * d * dv
    assert numbers(zeros("hla2", 1, h, h, d, dv)) == h * (d * d + d * dv)
    assert numbers(zeros("hla2", 1, h, 1, d, dv, normalize=True)) == d * d + h * d * dv + h * d
    assert numbers(zeros("ahla", 1, h, 1, d, dv)) == (1 + h) * d * dv
    assert numbers(zeros("hla3", 1, h, 1, d, dv)) == d * d + (1 + h) * d * dv


def test_key_moment_packs_into_its_upper_triangle():
    """Section 5.2: ``d (d + 1) / 2`` numbers hold all of S, bit for bit, after gates and many tokens."""
    q, k, v = (torch.randn(2, 50, 3, n) for n in (d, d, dv))
    _, state = hla.hla2(q, k, v, g=-torch.rand(2, 50, 3), output_final_state=True)
    stepped = None
    for t in range(50):
        _, stepped = hla.step("hla2", q[:, t], k[:, t], v[:, t], stepped)
    i, j = torch.triu_indices(d, d)
    for S in (state.S, stepped.S):
        packed = S[..., i, j]
        assert packed.shape[-1] == d * (d + 1) // 2
        whole = torch.zeros_like(S)
        whole[..., i, j] = whole[..., j, i] = packed
        assert_close(whole, S, 1e-6)
    assert torch.equal(whole, S)  # of the token step exactly


def test_cost_of_a_token_and_of_a_concatenation():
    """Section 5: ``O(d^2 + d dv)`` per token; ``d^2 dv`` per concatenation, where ``S_B C_A`` is of dense matrices."""
    q, k, v = (torch.zeros(1, 7, 1, n) for n in (d, d, dv))
    for name, cost in (
        ("hla2", d * d + 3 * d * dv + 3 * d),
        ("ahla", 2 * d * dv + 2 * d),
        ("hla3", 6 * d * d + 6 * d * dv + 4 * d),
    ):
        algorithm = lambda name=name: getattr(published, name)(q, k, v, form="recurrent")  # noqa: E731
        assert matmul_flops(algorithm) == 7 * 2 * cost
    token = hla2_token(*(x[0, 0] for x in (q, k, v)))
    assert matmul_flops(hla2_concat, token, token) == 2 * (d * d * dv + d * d)
    token = ahla_token(*(x[0, 0] for x in (q, k, v)), 0.9)
    assert matmul_flops(ahla_concat, token, token) == 2 * (d * d * dv + d * d)
    token = hla3_token(*(x[0, 0] for x in (q, k, v)))
    assert matmul_flops(hla3_concat, token, token) == 2 * (d**3 * (dv + 1) + 2 * d * d * (dv + 1))


@pytest.mark.parametrize("name", ["hla2", "ahla", "hla3"])
def test_nothing_of_size_n_by_n_is_made(name):
    T = 4096
    x = [torch.randn(1, T, 1, 4, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile(profile_memory=True) as profile:
        getattr(published, name)(*x).sum().backward()
    assert 0 < max(e.self_cpu_memory_usage for e in profile.events()) < T * T * 4 / 16


def test_maps_of_the_third_order_scan():
    """Section 7.3: ``d^3 dv`` and ``d^3`` numbers, of which ``d (d + 1) (d + 2) / 6`` (times dv) differ.

    A masked third order by `hla.hla3` has segment summaries of six matrices.
    """
    q, k, v = inputs(3, d, dv)
    x = hla3_token(q[0], k[0], v[0])
    for t in (1, 2):
        x = hla3_concat(x, hla3_token(q[t], k[t], v[t]))
    assert x.MKQP.numel() == d**3 * dv and x.MKQm.numel() == d**3
    assert numbers(x) == d**3 * (dv + 1) + 3 * d * d + 3 * d * dv + 3 * d
    for axes in ((1, 0, 2), (2, 1, 0)):  # M is sum k k k (times v): symmetric
        assert_close(x.MKQP.permute(*axes, 3), x.MKQP)
        assert_close(x.MKQm.permute(*axes), x.MKQm)
    distinct = len({tuple(sorted(n)) for n in torch.cartesian_prod(*[torch.arange(d)] * 3).tolist()})
    assert distinct == d * (d + 1) * (d + 2) // 6
    segment = summarize("hla3", *batched(q, k, v))
    assert numbers(segment) == 3 * d * d + 3 * d * dv + 1  # and the total decay


# -- Section 6 ---------------------------------------------------------------------------------------------------------


def test_asymmetric_product():
    """``A A V = Q (K^T Q)(K^T V)`` without the mask; with it, ``(A A)_tj = sum_{i=j..t}``, already lower triangular."""
    q, k, v = inputs(8)
    A = q @ k.T
    assert_close(A @ A @ v, q @ (k.T @ q) @ (k.T @ v))
    A = A.tril()
    AA = A @ A
    assert not AA.triu(1).any()  # a further mask removes nothing
    for t in range(8):
        for j in range(t + 1):
            assert_close(AA[t, j], sum((q[t] @ k[i]) * (q[i] @ k[j]) for i in range(j, t + 1)))
    assert_close(published.ahla(*batched(q, k, v))[0, :, 0], AA @ v)


# -- Section 7 ---------------------------------------------------------------------------------------------------------


def test_unmasked_third_order_factorises():
    """``[A A^T A]_tj = q_t^T (K^T K)(sum_u q_u q_u^T) k_j``; section 7.1's operator is its row t up to t."""
    q, k, v = inputs(7)
    A = q @ k.T
    assert_close(A @ A.T @ A, q @ (k.T @ k) @ (q.T @ q) @ k.T)
    o = published.hla3_prefix(*batched(q, k, v))[0, :, 0]
    for t in range(7):
        A = q[: t + 1] @ k[: t + 1].T
        assert_close(o[t], (A @ A.T @ A @ v[: t + 1])[-1])


def test_smallest_counterexample_to_theorem_7_1():
    """Two tokens, q = v = 1, k = 1, 2: no equation of its proof holds. The term (i, u, j) = (2, 1, 2) is 8."""
    q, k, v = scalars([1.0, 1.0], [1.0, 2.0], [1.0, 1.0])
    W = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=F64)
    assert (W @ W.T @ W).sum(1).tolist() == [4.0, 16.0]  # row 1 reads token 2, by u = 2
    assert ((W @ W.T).tril() @ W).sum(1).tolist() == [1.0, 16.0]  # u <= t
    S = [1.0, 5.0]
    assert sum(S) * (1.0 + 2.0) == 18.0  # the proof's sum over u <= t and j <= t, which lost j <= u
    for form in ("recurrent", "chunk", "scan"):
        assert published.hla3(q, k, v, form=form).flatten().tolist() == [1.0, 23.0]
    assert hla.hla3(q, k, v, scale=1.0)[0].flatten().tolist() == [1.0, 16.0]


def test_masked_third_order_streams_with_a_smaller_state():
    """What Theorem 7.1 is about: ``F_t = F_{t-1} + (S_t q_t)(P_t^T q_t)^T``, and ``o_t = q_t^T F_t``."""
    q, k, v = inputs(10)
    W = (q @ k.T).tril()
    S, P, F = torch.zeros(3, 3, dtype=F64), torch.zeros(3, 5, dtype=F64), torch.zeros(3, 5, dtype=F64)
    outputs = []
    for x, y, z in zip(q, k, v, strict=True):
        S, P = S + outer(y, y), P + outer(y, z)
        F = F + outer(S @ x, P.T @ x)
        outputs.append(x @ F)
    assert_close(torch.stack(outputs), (W @ W.T).tril() @ W @ v)
    assert_close(torch.stack(outputs), hla.hla3(*batched(q, k, v), scale=1.0)[0][0, :, 0])


def test_corrected_state_obeys_eq_7_5():
    """F of eq. 7.4 from the sums of section 7.1, and eta as its column for v = 1."""
    q, k, v = inputs(9)
    v = torch.cat([v, torch.ones(9, 1, dtype=F64)], 1)
    DK, DQ, DP = outer(k, k), outer(q, q), outer(k, v)
    zero = lambda x: torch.cat([torch.zeros_like(x[:1]), x.cumsum(0)])  # noqa: E731
    S, SQ, P = zero(DK), zero(DQ), zero(DP)  # S[t] is before token t
    G = (DK @ SQ[:-1] @ P[:-1] + S[:-1] @ DQ @ P[:-1] + S[:-1] @ SQ[:-1] @ DP).cumsum(0)
    eq_7_4 = S[1:] @ SQ[1:] @ P[1:] - G
    eq_7_5 = (S[:-1] @ DQ @ DP + DK @ SQ[:-1] @ DP + DK @ DQ @ P[:-1] + DK @ DQ @ DP).cumsum(0)
    assert_close(eq_7_5, eq_7_4)
    assert_close(vm(q, eq_7_4)[:, :-1], published.hla3(*batched(q, k, v))[0, :, 0, :-1])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_corrected_state_with_decay(gamma):
    """The recurrence that F has in Algorithm 3; eq. 7.5 at gamma = 1."""
    q, k, v = inputs(9)
    S, Q, P, F = torch.zeros(3, 3, dtype=F64), torch.zeros(3, 3, dtype=F64), *torch.zeros(2, 3, 5, dtype=F64)
    outputs = []
    for x, y, z in zip(q, k, v, strict=True):
        DK, DQ, DP = outer(y, y), outer(x, x), outer(y, z)
        F = gamma * F + (gamma**3 - gamma) * S @ Q @ P + (gamma**2 - 1) * (DK @ Q @ P + S @ DQ @ P + S @ Q @ DP)
        F = F + gamma * (S @ DQ @ DP + DK @ Q @ DP + DK @ DQ @ P) + DK @ DQ @ DP
        S, Q, P = gamma * S + DK, gamma * Q + DQ, gamma * P + DP
        outputs.append(x @ F)
    truth = published.hla3(*batched(q, k, v), gamma=gamma, form="recurrent")
    assert_close(torch.stack(outputs), truth[0, :, 0])


def test_smallest_counterexample_to_decay_by_section_7_3():
    """gamma = 1/2 and q = k = v = 1, two tokens: Algorithm 3 gives 3/8, scaled carries 3."""
    a, b = token_tuples(hla3_token, 2)
    assert hla3_concat(HLA3Tuple(*(0.5 * x for x in a)), b).F.item() == 3.0
    ones = scalars([1.0] * 2, [1.0] * 2, [1.0] * 2)
    assert published.hla3(*ones, gamma=0.5, form="recurrent").flatten().tolist() == [1.0, 0.375]
