"""hla_q: what its polynomial is, what it approaches, and what it refuses."""

import math

import pytest
import torch

import hla
from hla.ops.checks import chebyshev_nodes
from hla.ops.state import HLAQState
from tests.ops.cases import F64, Inputs, assert_close


def moments(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """``S_t``, ``P_t`` as explicit ``[B, T, HQ, K, K or V]``."""
    k, v = (y.repeat_interleave(2, 2) for y in (x.k, x.v))
    g = x.kw.get("g")
    decay = torch.zeros(*x.q.shape[:2], 2, dtype=F64) if g is None else g
    decay = decay.repeat_interleave(2, 2).exp()[..., None, None]
    S, P, s, p = [], [], 0.0, 0.0
    for t in range(x.q.shape[1]):
        s = decay[:, t] * s + k[:, t, :, :, None] * k[:, t, :, None, :]
        p = decay[:, t] * p + k[:, t, :, :, None] * v[:, t, :, None, :]
        S.append(s), P.append(p)
    return torch.stack(S, 1), torch.stack(P, 1)


@pytest.mark.parametrize("option", ["plain", "g"])
def test_it_approaches_the_least_squares_read_out(option):
    """Every further reading brings it nearer to ``P^T (S + ridge I)^{-1} q``, at Chebyshev's rate."""
    x = Inputs("hla_q4", option)
    S, P = moments(x)
    ridge = 40.0  # the spectrum lies between ridge and ridge + trace, about 40 to 150
    eye = torch.eye(3, dtype=F64)
    truth = (P.mT @ torch.linalg.solve(S + ridge * eye, x.q[..., None]))[..., 0]
    errors = []
    for order in (1, 2, 4, 8, 12):
        o, _ = hla.hla_q(x.q, x.k, x.v, order=order, ridge=ridge, g=x.kw.get("g"))
        errors.append(float((o - truth).norm() / truth.norm()))
    assert all(b < 0.5 * a for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-6  # 2 ((sqrt(c) - 1) / (sqrt(c) + 1))^13 for the condition number c, about 4


def test_the_polynomial_is_richardsons():
    """``(S + ridge I) x = q - prod_n (I - (S + ridge I) / theta_n) q``: what is left is a product over nodes."""
    x = Inputs("hla_q4", "g,nodes,ridge per token")
    S, P = moments(x)
    A = S + x.kw["ridge"][..., None, None] * torch.eye(3, dtype=F64)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)
    left = x.q[..., None]
    for n in range(5):
        theta = x.kw["ridge"] + x.kw["nodes"][..., n] * trace
        left = left - A @ left / theta[..., None, None]
    y = torch.linalg.solve(A, x.q[..., None] - left)
    assert_close(x.chunk()[0], (P.mT @ y)[..., 0], 1e-10)


@pytest.mark.parametrize("order", [1, 2, 4, 7])
def test_chebyshevs_nodes_leave_least(order):
    """Over ``[ridge, ridge + trace]`` the factor that is left stays below ``1 / T_n((2 ridge + trace) / trace)``."""
    ridge, trace = 0.7, 5.0
    s = torch.linspace(0, 1, 1001, dtype=F64) * trace + ridge
    left = torch.stack([1 - s / (ridge + node * trace) for node in chebyshev_nodes(order)]).prod(0)
    bound = 1 / math.cosh((order + 1) * math.acosh(1 + 2 * ridge / trace))
    assert float(left.abs().max()) == pytest.approx(bound, rel=1e-6)


def test_the_order_of_nodes_changes_nothing_but_rounding():
    x = Inputs("hla_q4", "nodes")
    o, _ = x.chunk()
    x.kw["nodes"] = x.kw["nodes"].flip(-1)
    assert_close(x.chunk()[0], o, 1e-9)


def test_float32_keeps_its_digits():
    """With small nodes first; largest first the error is 9e-6."""
    x = Inputs("hla_q4", T=300, K=16, V=24)
    truth, _ = hla.hla_q(x.q, x.k, x.v, order=8)
    low, _ = hla.hla_q(x.q.float(), x.k.float(), x.v.float(), order=8)
    assert float((low - truth).norm() / truth.norm()) < 1e-6


def test_coefficients_are_not_rounded_to_the_dtype_of_the_operands():
    x = Inputs("hla_q4", T=30)
    nodes = torch.tensor([0.2003, 0.2007, 0.4, 0.6, 0.9])
    q, k, v = (y.bfloat16() for y in (x.q, x.k, x.v))
    low, _ = hla.hla_q(q, k, v, nodes=nodes, ridge=1.003)
    truth, _ = hla.hla_q(*(y.double() for y in (q, k, v)), nodes=nodes, ridge=1.003)
    # The sums are float32: all but a few of the rounded results are those of the float64 sums.
    assert float((low == truth.bfloat16()).double().mean()) > 0.98


def test_nodes_of_every_shape_agree():
    x = Inputs("hla_q4")
    nodes = torch.tensor([0.9, 0.5, 0.4, 0.2, 0.1], dtype=F64)
    o, _ = x.chunk(nodes=nodes)
    for shaped in (nodes.expand(4, 5), nodes.expand(2, 37, 4, 5)):
        assert torch.equal(x.chunk(nodes=shaped)[0], o)
    assert torch.equal(x.chunk()[0], x.chunk(nodes=chebyshev_nodes(4))[0])


def test_a_large_ridge_is_first_order_linear_attention():
    x = Inputs("hla_q1", "g")
    ridge = 1e8
    o, _ = x.chunk(ridge=ridge)
    first, _ = hla.linear_attn(x.q, x.k, x.v, g=x.kw["g"], scale=1.0)
    assert_close(o * ridge, first, 1e-5)


def test_state_does_not_grow_with_the_order():
    x = Inputs("hla_q4")
    _, state = x.chunk(output_final_state=True)
    assert isinstance(state, HLAQState)
    S, P = moments(x)
    assert_close(state.S, S[:, -1, ::2])
    assert_close(state.P, P[:, -1, ::2])


def test_the_final_state_has_gradients():
    x = Inputs("hla_q4", "g", B=1, T=20)
    leaves = [y.requires_grad_() for y in (x.q, x.k, x.v, x.kw["g"])]

    def function(q, k, v, g):
        half = [y[:, :11] for y in (q, k, v, g)], [y[:, 11:] for y in (q, k, v, g)]
        _, state = hla.hla_q(*half[0][:3], g=half[0][3], output_final_state=True)
        return hla.hla_q(*half[1][:3], g=half[1][3], initial_state=state)[0]

    whole = hla.hla_q(*leaves[:3], g=leaves[3])[0][:, 11:]
    do = torch.randn(whole.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    for a, b in zip(
        torch.autograd.grad(function(*leaves), leaves, do), torch.autograd.grad(whole, leaves, do), strict=True
    ):
        assert_close(a, b, 1e-10)


BAD = [
    (dict(ridge=0.0), ValueError, "ridge must be positive; got 0.0"),
    (dict(ridge=-1.0), ValueError, "ridge must be positive"),
    (dict(ridge=torch.zeros(2, 37, 4, dtype=F64)), ValueError, "ridge must be positive"),
    (dict(ridge=torch.ones(2, 37, 2, dtype=F64)), ValueError, "ridge must have shape"),
    (dict(order=0), ValueError, "order must be at least 1"),
    (dict(order=None), TypeError, "order"),
    (dict(nodes=torch.ones(4, dtype=F64)), ValueError, "nodes must have one of the shapes"),
    (dict(nodes=torch.ones(2, 5, dtype=F64)), ValueError, "nodes must have one of the shapes"),
    (dict(nodes=-torch.ones(5, dtype=F64)), ValueError, "nodes must be finite and >= 0"),
    (dict(nodes=torch.full((5,), math.inf)), ValueError, "nodes must be finite"),
    (dict(nodes=torch.ones(5, dtype=torch.int64)), TypeError, "nodes must be a floating-point tensor"),
    (dict(nodes=[0.5] * 5), TypeError, "nodes must be a tensor"),
    (dict(p="k"), TypeError, "p"),
    (dict(normalize=True), TypeError, "normalize"),
]


@pytest.mark.parametrize("changes,error,message", BAD)
def test_bad_calls_are_named(changes, error, message):
    x = Inputs("hla_q4")
    with pytest.raises(error, match=message):
        hla.hla_q(x.q, x.k, x.v, **changes)


def test_other_operators_refuse_nodes_and_steps_refuse_what_hla_q_has_not():
    q, k, v = (torch.randn(2, 4, 8) for _ in range(3))
    for op, changes, named in (
        ("hla2", dict(nodes=torch.ones(5)), "hla2 does not read nodes"),
        ("hla_q", dict(normalize=True), "normalize"),
        ("hla_q", dict(p="k"), "hla_q has no inner query"),
        ("hla_q", dict(gain=0.5), "hla_q does not read gain"),
        ("hla_q", dict(ridge=0.0), "ridge must be positive"),
    ):
        with pytest.raises(ValueError, match=named):
            hla.step(op, q, k, v, None, **changes)
