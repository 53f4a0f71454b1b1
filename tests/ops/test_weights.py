"""The explicit weight matrices: they are what the operators compute, causal to the last bit, for every option."""

import pytest
import torch

import hla
from hla import reference
from tests.ops.cases import CASES, F64, OPERATORS, Inputs, assert_close, case, operator


def matrix(x: Inputs) -> torch.Tensor:
    order = {} if x.order is None else {"order": x.order}
    return reference.weights(x.op, x.q, x.k, **{**x.kw, **order})


def apply(A: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Written out, and not with the function under test."""
    return torch.einsum("bhtj,bjhv->bthv", A, v.repeat_interleave(A.shape[1] // v.shape[2], 2))


@case
def test_weights_times_values_are_the_operator(name, option):
    x = Inputs(name, option, T=21)
    A = matrix(x)
    assert A.shape == (2, 4, 21, 21) and A.dtype == F64
    assert not A.triu(1).any()  # exactly 0
    o = apply(A, x.v)
    assert_close(o, x.reference(), 1e-12)
    assert_close(o, x.chunk()[0], 1e-10)


@operator
@pytest.mark.parametrize("T", [0, 1])
def test_empty_and_single_tokens(name, T):
    x = Inputs(name, T=T)
    A = matrix(x)
    assert A.shape == (2, 4, T, T)
    assert_close(apply(A, x.v), x.chunk()[0], 1e-12)


def test_the_cases_cover_every_operator():
    assert {OPERATORS[name][0] for name, _ in CASES} == set(hla.ops.family.OPS)


def test_second_order_weights_are_sums_over_paths():
    """From t to every i, and from i to j: token by token, ``sum_{i<=j} D_ti (q_t . k_i) D_ji (q_j . k_i)``."""
    x = Inputs("hla2", "g", T=6, HQ=2, HKV=2)
    c = x.kw["g"].cumsum(1)
    truth = torch.zeros(2, 2, 6, 6, dtype=F64)
    for b in range(2):
        for h in range(2):
            for t in range(6):
                for j in range(t + 1):
                    for i in range(j + 1):
                        decay = torch.exp(c[b, t, h] - c[b, i, h] + c[b, j, h] - c[b, i, h])
                        path = (x.q[b, t, h] @ x.k[b, i, h]) * (x.q[b, j, h] @ x.k[b, i, h])
                        truth[b, h, t, j] += decay * path / 3  # twice the scale 3 ** -0.5
    assert_close(matrix(x), truth)


def test_normalised_rows_sum_to_one():
    x = Inputs("hla3", "normalize", T=9)
    x.kw["eps"] = 1e-12
    assert_close(matrix(x).sum(-1), torch.ones(2, 4, 9, dtype=F64), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_read_in_float32(dtype):
    x = Inputs("hla2", T=9, dtype=dtype)
    assert matrix(x).dtype == torch.float32
    assert x.reference().dtype == dtype
    wide = reference.weights("hla2", x.q.double(), x.k.double())
    assert_close(matrix(x), wide, 1e-6)


@pytest.mark.parametrize(
    "op, keywords, error, message",
    [
        ("hla4", {}, ValueError, "op must be one of"),
        ("hla2", {"order": 2}, ValueError, "hla2 has no argument order"),
        ("hla_n", {}, ValueError, "hla_n needs the argument order"),
        ("linear_attn", {"ridge": 0.5}, ValueError, "linear_attn does not read ridge"),
        ("hla2", {"value_gain": 0.5}, ValueError, "hla2 does not read value_gain"),
        ("hla_q", {"ridge": 0.0}, ValueError, "ridge must be positive"),
        ("hla_q", {"normalize": True}, ValueError, "no normalised form"),
        ("ahla", {"scale": "big"}, TypeError, "scale must be a number"),
    ],
)
def test_what_an_operator_does_not_read_is_refused(op, keywords, error, message):
    q = k = torch.randn(1, 4, 1, 3)
    with pytest.raises(error, match=message):
        reference.weights(op, q, k, **keywords)
