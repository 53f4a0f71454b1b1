"""`hla.step`: one token of every operator; in place, in slots, differentiable, and of constant size."""

import pytest
import torch
from torch import Tensor

import hla
from hla.ops import state as states
from tests.ops.cases import F64, Inputs, assert_close, assert_states_close, case, operator


def token(x: Inputs, t: int):
    at = lambda y: y[:, t] if isinstance(y, Tensor) and y.dim() > 2 else y  # noqa: E731
    return (x.op, at(x.q), at(x.k), at(x.v)), {n: at(y) for n, y in x.kw.items()}


@case
def test_token_steps_equal_the_definition(name, option):
    x = Inputs(name, option, T=11)
    state, outputs = None, []
    for t in range(11):
        args, kw = token(x, t)
        o, state = hla.step(*args, state, **kw)
        outputs.append(o)
    assert_close(torch.stack(outputs, 1), x.reference())


@operator
def test_in_place_keeps_addresses_and_gives_the_same(name):
    x = Inputs(name, T=5)
    state = None
    in_place = states.zeros(x.op, 2, 4, 2, 3, 5, order=x.kw.get("order"), dtype=F64)
    addresses = [y.data_ptr() for y in in_place if y is not None]
    for t in range(5):
        args, kw = token(x, t)
        o, state = hla.step(*args, state, **kw)
        o2, returned = hla.step(*args, in_place, out_state=in_place, **kw)
        assert returned is in_place
        assert torch.equal(o, o2)
    assert_states_close(in_place, state)
    assert [y.data_ptr() for y in in_place if y is not None] == addresses


@operator
def test_slots_of_a_larger_state(name):
    """Rows picked by state_indices advance as they would alone; the others are untouched."""
    x = Inputs(name, T=3)
    args, kw = token(x, 0)
    zero = states.zeros(x.op, 5, 4, 2, 3, 5, order=x.kw.get("order"), dtype=F64)
    slots = type(zero)(*(None if y is None else torch.randn_like(y) for y in zero))
    before = type(zero)(*(None if y is None else y.clone() for y in slots))
    index = torch.tensor([3, 1], dtype=torch.int32)
    alone = type(zero)(*(None if y is None else y[index.long()] for y in slots))
    o, truth = hla.step(*args, alone, **kw)
    o2, copy = hla.step(*args, slots, state_indices=index, **kw)
    assert_states_close(slots, before, 0.0)
    o3, written = hla.step(*args, slots, state_indices=index, out_state=slots, **kw)
    assert torch.equal(o, o2) and torch.equal(o, o3) and written is slots
    for new in (copy, slots):
        for y, y_true, y_old in zip(new, truth, before, strict=True):
            if y is not None:
                assert torch.equal(y[[3, 1]], y_true) and torch.equal(y[[0, 2, 4]], y_old[[0, 2, 4]])


@operator
def test_slots_may_start_empty(name):
    """state=None with out_state and state_indices: a new request in its slot, whatever the slot held before."""
    x = Inputs(name, T=3)
    args, kw = token(x, 0)
    o, truth = hla.step(*args, None, **kw)
    zero = states.zeros(x.op, 5, 4, 2, 3, 5, order=x.kw.get("order"), dtype=F64)
    slots = type(zero)(*(None if y is None else torch.randn_like(y) for y in zero))
    o2, written = hla.step(*args, None, state_indices=torch.tensor([3, 1]), out_state=slots, **kw)
    assert torch.equal(o, o2) and written is slots
    assert all(y is None or torch.equal(y[[3, 1]], z) for y, z in zip(slots, truth, strict=True))


@operator
def test_steps_are_differentiable(name):
    x = Inputs(name, B=1, T=4)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
    x.q, x.k, x.v = leaves
    state, outputs = None, []
    for t in range(4):
        args, kw = token(x, t)
        o, state = hla.step(*args, state, **kw)
        outputs.append(o)
    do = torch.randn(1, 4, 4, 5, dtype=F64)
    grads = torch.autograd.grad(torch.stack(outputs, 1), leaves, do)
    for grad, truth in zip(grads, torch.autograd.grad(x.reference(), leaves, do), strict=True):
        assert_close(grad, truth)


def test_classes_of_states():
    expected = {"ahla": "AHLAState", "ahla1": "AHLANState", "ahla3": "AHLANState", "hla_n4": "HLANState"}
    assert {n: type(Inputs(n).chunk(output_final_state=True)[1]).__name__ for n in expected} == expected


def test_state_size_does_not_grow():
    x = Inputs("hla3", T=50, dtype=torch.bfloat16)
    state, sizes = None, set()
    for t in range(50):
        args, kw = token(x, t)
        _, state = hla.step(*args, state, **kw)
        sizes.add(states.state_nbytes(state))
    assert sizes == {4 * 2 * (2 * 3 * 3 + 2 * 3 * 5 + 4 * 3 * 5)}  # S, P per key head and F per query head, float32
    assert states.state_nbytes(type(state)(*(None if y is None else y.double() for y in state))) == 2 * sizes.pop()


@operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_chunk_form(name, dtype):
    """Output in the dtype of v, state in float32, and gain and ridge in any floating dtype."""
    x = Inputs(name, "g", T=1, dtype=dtype)
    x.kw["g"] = x.kw["g"].float()
    if x.op == "hla_q":
        x.kw["ridge"] = torch.rand(2, 1, 4, dtype=torch.bfloat16) + 0.5
    elif name != "linear_attn":
        x.kw |= dict(gain=torch.rand(2, 1, 4, dtype=F64), ridge=torch.rand(2, 1, 4, dtype=torch.bfloat16))
    truth, truth_state = x.chunk(output_final_state=True)
    args, kw = token(x, 0)
    o, state = hla.step(*args, None, **kw)
    assert o.dtype == truth.dtype == dtype
    assert_close(o, truth[:, 0], {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
    assert all(a is None or a.dtype == b.dtype == torch.float32 for a, b in zip(state, truth_state, strict=True))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("normalize", [False, True])
def test_pack_and_unpack_are_inverse(order, normalize):
    for op in ("ahla", "hla_n"):
        state = states.zeros(op, 2, 4, 2, 3, 5, order=order, normalize=normalize)
        assert_states_close(states.pack(op, order, *states.unpack(op, order, state)), state)
