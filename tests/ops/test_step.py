"""`hla.step`: a few tokens of every operator; in place, in slots, packed, differentiable, and of constant size."""

import pytest
import torch
from torch import Tensor

import hla
from hla.ops import state as states
from hla.ops.checks import check_call
from tests.ops.cases import F64, Inputs, assert_close, assert_states_close, case, operator


def token(x: Inputs, t: int):
    at = lambda y: y[:, t] if isinstance(y, Tensor) and y.dim() > 2 else y  # noqa: E731
    return (x.op, at(x.q), at(x.k), at(x.v)), {n: at(y) for n, y in x.kw.items()}


def like(state, function):
    return type(state)(*(None if y is None else function(y) for y in state))


def some_state(x: Inputs, rows: int, dtype=F64):
    """Random moments with a symmetric S."""
    zero = states.zeros(
        x.op, rows, *(x.q.shape[2], x.k.shape[2], x.k.shape[3], x.v.shape[3]), order=x.kw.get("order"),
        p_heads=check_call(x.op, x.q, x.k, x.v, **x.kw).p.shape[2], normalize=x.kw.get("normalize", False), dtype=F64,
    )  # fmt: skip
    state = like(zero, torch.randn_like)
    if getattr(state, "S", None) is not None:
        S = state.S @ state.S.mT
        state = state._replace(S=S + S.mT)  # the product is not symmetric to the last bit
    return like(state, lambda y: y.to(dtype))


def several(x: Inputs, state, count: int, **more):
    """The first tokens of x in one call, and in as many calls."""
    part = x.tokens(0, count)
    together = hla.step(x.op, part.q, part.k, part.v, state, **part.kw, **more)
    outputs, alone = [], state
    for t in range(count):
        args, kw = token(x, t)
        o, alone = hla.step(*args, alone, **kw)
        outputs.append(o)
    return together, (torch.stack(outputs, 1), alone)


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


@case
def test_several_tokens_in_one_call_equal_single_calls(name, option):
    x = Inputs(name, option, T=8)
    for count in (1, 3, 8):
        for state in (None, some_state(x, 2)):
            (o, new), (truth, true_state) = several(x, state, count)
            assert torch.equal(o, truth)
            assert_states_close(new, true_state, 0.0)


@operator
def test_several_tokens_in_place_and_in_slots(name):
    x = Inputs(name, "g", T=4)
    slots = some_state(x, 5)
    before, index = like(slots, Tensor.clone), torch.tensor([3, 1])
    _, (truth, alone) = several(x, like(slots, lambda y: y[index]), 4)
    o, written = hla.step(x.op, x.q, x.k, x.v, slots, out_state=slots, state_indices=index, **x.kw)
    assert torch.equal(o, truth) and written is slots
    for y, y_true, y_old in zip(slots, alone, before, strict=True):
        assert y is None or (torch.equal(y[[3, 1]], y_true) and torch.equal(y[[0, 2, 4]], y_old[[0, 2, 4]]))


@operator
def test_several_tokens_round_a_bfloat16_state_once(name):
    x = Inputs(name, "g", T=4, dtype=torch.float32)
    state = some_state(x, 2, torch.bfloat16)
    o, new = hla.step(x.op, x.q, x.k, x.v, state, **x.kw)
    truth, true_state = hla.step(x.op, x.q, x.k, x.v, like(state, Tensor.float), **x.kw)
    assert torch.equal(o, truth)
    assert_states_close(new, like(true_state, Tensor.bfloat16), 0.0)


PACKS = ("hla2", "hla3", "hla_n4", "hla_n5", "hla_q4")
packs = pytest.mark.parametrize("name", PACKS)


def test_packed_layout():
    """Tile (i, j) is number i (i + 1) / 2 + j; K is filled up with zeros; 9216 numbers at K = 128."""
    S = torch.randn(2, 3, 40, 40, dtype=F64)
    S = S + S.mT
    tiles = states.pack_S(S)
    assert tiles.shape == (2, 3, 6, 16, 16)
    assert torch.equal(tiles[:, :, 1], S[:, :, 16:32, :16])
    assert torch.equal(tiles[:, :, 4, :8], S[:, :, 32:, 16:32]) and (tiles[:, :, 4, 8:] == 0).all()
    assert torch.equal(tiles[:, :, 5, :8, :8], S[:, :, 32:, 32:])
    assert torch.equal(states.unpack_S(tiles, 40), S)
    assert states.pack_S(torch.zeros(1, 1, 128, 128)).numel() == 9216


@packs
def test_packing_a_state_loses_nothing(name):
    for K in (16, 20):
        state = some_state(Inputs(name, T=1, K=K), 2)
        packed = state.pack()
        assert type(packed) is type(state) and packed.S.dim() == 5 and packed.pack() is packed
        assert all(x is y for field, x, y in zip(state._fields, state, packed, strict=True) if field != "S")
        assert_states_close(packed.unpack(), state, 0.0)
        assert state.unpack() is state and state.pack().unpack().S.is_contiguous()
    assert states.state_nbytes(packed) - states.state_nbytes(state) == 2 * 2 * (3 * 256 - 20 * 20) * 8
    order_1 = states.zeros("hla_n", 1, 1, 1, 3, 5, order=1)
    assert order_1.pack() is order_1 and order_1.unpack() is order_1  # no S


@packs
@pytest.mark.parametrize("count", [None, 3])
def test_a_step_takes_and_returns_a_packed_state(name, count):
    x = Inputs(name, "g", T=3, K=20)
    args, kw = token(x, 0) if count is None else ((x.op, x.q, x.k, x.v), x.kw)
    state = some_state(x, 2)
    o, new = hla.step(*args, state, **kw)
    o2, packed = hla.step(*args, state.pack(), **kw)
    assert_close(o2, o)
    assert_states_close(packed, new.pack())
    in_place = state.pack()
    address = in_place.S.data_ptr()
    o3, returned = hla.step(*args, in_place, out_state=in_place, **kw)
    assert returned is in_place and in_place.S.data_ptr() == address and torch.equal(o3, o2)
    assert_states_close(in_place, packed, 0.0)
    index, slots = torch.tensor([3, 1]), some_state(x, 5).pack()
    o4, _ = hla.step(*args, None, out_state=slots, state_indices=index, **kw)
    o5, fresh = hla.step(*args, None, **kw)
    assert torch.equal(o4, o5)
    assert_states_close(like(slots, lambda y: y[index]), fresh.pack(), 0.0)


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
