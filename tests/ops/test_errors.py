"""Every kind of bad input gets a ValueError or TypeError whose message names the argument."""

import pytest
import torch

import hla
from hla.ops import dispatch
from hla.ops.segments import advance, summarize
from hla.ops.state import AHLAState, HLA2State, zeros

B, T, HQ, HKV, K, V = 2, 5, 4, 2, 3, 6


def good(**changes):
    """Keywords of a good hla2 call, changed."""
    torch.manual_seed(0)
    kw = dict(q=torch.randn(B, T, HQ, K), k=torch.randn(B, T, HKV, K), v=torch.randn(B, T, HKV, V))
    return kw | changes


def state(**kw):
    return zeros("hla2", B, HQ, HKV, K, V, **kw)


r = torch.randn
TABLE = [
    # what is wrong, changed keywords, error, what the message must say
    ("q is no tensor", dict(q=[1.0]), TypeError, "q must be a tensor; got list"),
    ("k is None", dict(k=None), TypeError, "k must be a tensor"),
    ("q has 3 dimensions", dict(q=r(B, T, K)), ValueError, r"q must have shape \[B, T, heads, dim\]"),
    ("q is integer", dict(q=torch.ones(B, T, HQ, K).long()), TypeError, "q must be float64, float32"),
    ("q is complex", dict(q=torch.ones(B, T, HQ, K).cfloat()), TypeError, "q must be float64, float32"),
    ("k of another dtype", dict(k=r(B, T, HKV, K).double()), TypeError, "k must have the dtype of q"),
    ("v of another dtype", dict(v=r(B, T, HKV, V).bfloat16()), TypeError, "v must have the dtype of q"),
    ("k on another device", dict(k=torch.empty(B, T, HKV, K, device="meta")), ValueError, "k must have the device of q"),
    ("k of another batch", dict(k=r(1, T, HKV, K)), ValueError, "k must have the B and T of q"),
    ("v of another length", dict(v=r(B, T + 1, HKV, V)), ValueError, "v must have the B and T of q"),
    ("k of another width", dict(k=r(B, T, HKV, K + 1)), ValueError, "k must have the head dimension of q, 3"),
    ("v of other heads", dict(v=r(B, T, 1, V)), ValueError, "v must have the 2 heads of k"),
    ("3 query heads on 2", dict(q=r(B, T, 3, K)), ValueError, r"heads of q \(3\) must be a multiple"),
    ("head dimension 0", dict(q=r(B, T, HQ, 0), k=r(B, T, HKV, 0)), ValueError, "q must have 1 to 256"),
    ("head dimension 257", dict(v=r(B, T, HKV, 257)), ValueError, "v must have 1 to 256"),
    ("no heads", dict(q=r(B, T, 0, K), k=r(B, T, 0, K), v=r(B, T, 0, V)), ValueError, "heads of q"),
    ("g is a float", dict(g=-0.1), TypeError, "g must be a tensor"),
    ("g per query head", dict(g=-torch.rand(B, T, HQ)), ValueError, r"g must have shape \[2, 5, 2\]"),
    ("g is bfloat16", dict(g=-torch.rand(B, T, HKV).bfloat16()), TypeError, "g .*must be float32"),
    ("g is float64", dict(g=-torch.rand(B, T, HKV).double()), TypeError, "g .*must be float32"),
    ("g positive", dict(g=torch.full((B, T, HKV), 0.1)), ValueError, "g is the logarithm of a decay"),
    ("g minus infinity", dict(g=torch.full((B, T, HKV), float("-inf"))), ValueError, "finite and <= 0"),
    ("unknown p", dict(p="v"), ValueError, "p .*must be 'q', 'k' or a tensor; got 'v'"),
    ("p is a number", dict(p=1.0), TypeError, "p must be a tensor"),
    ("p of 3 heads", dict(p=r(B, T, 3, K)), ValueError, "p must have shape .*4 or 2 heads"),
    ("p of another width", dict(p=r(B, T, HQ, K + 1)), ValueError, "p must have shape"),
    ("p of another dtype", dict(p=r(B, T, HQ, K).double()), TypeError, "p must have the dtype of q"),
    ("ridge is a string", dict(ridge="big"), TypeError, "ridge must be a number or a tensor"),
    ("ridge NaN", dict(ridge=float("nan")), ValueError, "ridge must be finite"),
    ("ridge per key head", dict(ridge=r(B, T, HKV)), ValueError, r"ridge must have shape \[2, 5, 4\]"),
    ("gain per query head, p=k", dict(p="k", gain=r(B, T, HQ)), ValueError, r"gain must have shape \[2, 5, 2\]"),
    ("gain integer tensor", dict(gain=torch.ones(B, T, HQ).long()), TypeError, "gain must be a floating-point tensor"),
    ("gain a 0-d tensor", dict(gain=torch.tensor(1.0)), ValueError, "gain must have shape"),
    ("scale is a tensor", dict(scale=torch.tensor(1.0)), TypeError, "scale must be a number"),
    ("scale infinite", dict(scale=float("inf")), ValueError, "scale must be finite"),
    ("scale is True", dict(scale=True), TypeError, "scale must be a number"),
    ("normalize is a string", dict(normalize="yes"), TypeError, "normalize must be True or False"),
    ("eps negative", dict(eps=-1.0), ValueError, "eps must be positive"),
    ("eps 0 with normalize", dict(normalize=True, eps=0.0), ValueError, "eps must be positive"),
    ("eps NaN", dict(eps=float("nan")), ValueError, "eps must be finite"),
    ("output_final_state is 1", dict(output_final_state=1), TypeError, "output_final_state must be True or False"),
    ("state is a tensor", dict(initial_state=r(B, HQ, K, V)), TypeError, "initial_state of hla2 must be a HLA2State"),
    ("state is a plain tuple", dict(initial_state=(1, 2, None)), TypeError, "must be a HLA2State; got tuple"),
    ("state of another operator", dict(initial_state=AHLAState(r(1), r(1))), TypeError, "HLA2State; got AHLAState"),
    ("state of another batch", dict(initial_state=zeros("hla2", 3, HQ, HKV, K, V)), ValueError, r"initial_state\.S must"),
    ("state of p=k for p=q", dict(initial_state=state(p_heads=HKV)), ValueError, r"initial_state\.F must have shape"),
    ("state in float64", dict(initial_state=state(dtype=torch.float64)), TypeError, r"initial_state\.S must be torch.float32"),
    ("state on another device", dict(initial_state=state(device="meta")), ValueError, r"initial_state\.S must have the device"),
    ("state with normalize", dict(initial_state=state(normalize=True)), ValueError, "was made with normalize=True"),
    ("state without normalize", dict(initial_state=state(), normalize=True), ValueError, "was made without normalize=True"),
    ("state field is None", dict(initial_state=HLA2State(None, r(B, HQ, K, V))), ValueError, r"initial_state\.S must be given"),
    ("g on another device", dict(g=torch.empty(B, T, HKV, device="meta")), ValueError, "g must have the device of q"),
    ("p on another device", dict(p=torch.empty(B, T, HQ, K, device="meta")), ValueError, "p must have the device of q"),
    ("gain on another device", dict(gain=torch.empty(B, T, HQ, device="meta")), ValueError, "gain must have the device of q"),
    ("p of another length", dict(p=r(B, T + 1, HQ, K)), ValueError, "p must have shape"),
    ("unknown backend", dict(backend="cuda"), ValueError, "backend must be None, 'torch' or 'triton'"),
    ("cu_seqlens is a list", dict(cu_seqlens=[0, 5]), TypeError, "cu_seqlens must be a tensor"),
    ("cu_seqlens with B = 2", dict(cu_seqlens=torch.tensor([0, 5])), ValueError, "B = 1"),
    ("unknown keyword", dict(lenght=3), TypeError, "lenght"),
]  # fmt: skip

PACKED = [
    ("floats", torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens must be int32 or int64"),
    ("two dimensions", torch.tensor([[0, 5]]), ValueError, r"cu_seqlens must have shape \[N \+ 1\]"),
    ("one number", torch.tensor([0]), ValueError, r"cu_seqlens must have shape \[N \+ 1\]"),
    ("not from 0", torch.tensor([1, 5]), ValueError, "cu_seqlens must start at 0; got 1"),
    ("not to T", torch.tensor([0, 4]), ValueError, "cu_seqlens must end at T = 5; got 4"),
    ("decreasing", torch.tensor([0, 4, 3, 5]), ValueError, "cu_seqlens must not decrease"),
    ("another device", torch.zeros(2, dtype=torch.long, device="meta"), ValueError, "cu_seqlens must have the device of q"),
]  # fmt: skip


def test_the_good_call_is_good():
    o, s = hla.hla2(**good())
    assert o.shape == (B, T, HQ, V) and s is None
    assert hla.hla2(**good(p=None))[0].equal(o)
    assert hla.hla2(**good(initial_state=state(), ridge=1, gain=r(B, T, HQ)))[0].shape == o.shape


def test_the_table_is_long_enough():
    assert len(TABLE) + len(PACKED) >= 40


@pytest.mark.parametrize("what,changes,error,message", TABLE, ids=[row[0] for row in TABLE])
def test_bad_input_is_named(what, changes, error, message):
    kw = good(**changes)
    q, k, v = (kw.pop(x) for x in "qkv")
    with pytest.raises(error, match=message):
        hla.hla2(q, k, v, **kw)


@pytest.mark.parametrize("what,cu,error,message", PACKED, ids=[row[0] for row in PACKED])
def test_bad_cu_seqlens_are_named(what, cu, error, message):
    q, k, v = (x[:1] for x in good().values())
    with pytest.raises(error, match=message):
        hla.hla2(q, k, v, cu_seqlens=cu)


ORDERS = [
    (lambda *x: hla.hla_n(*x, order=0), ValueError, "order must be at least 1"),
    (lambda *x: hla.hla_n(*x, order=2.0), TypeError, "order must be an integer"),
    (lambda *x: hla.hla_n(*x, order=True), TypeError, "order must be an integer"),
    (lambda *x: hla.hla_n(*x), TypeError, "order"),
    (lambda *x: hla.hla_n(*x, order=None), ValueError, "hla_n needs the argument order"),
    (lambda *x: hla.ahla(*x, order=-1), ValueError, "order must be at least 1"),
    (lambda *x: hla.ahla(*x, order=None), TypeError, "order must be an integer"),
    (lambda *x: hla.hla3(*x, value_gain="x"), TypeError, "value_gain must be a number or a tensor"),
    (lambda *x: hla.hla3(*x, value_ridge=r(B, T, 1)), ValueError, "value_ridge must have shape"),
    (lambda *x: hla.linear_attn(*x, p="k"), TypeError, "p"),
    (lambda *x: hla.linear_attn(*x, causal=1), TypeError, "causal must be True or False"),
    (lambda *x: hla.linear_attn(*x, causal=False, g=-torch.rand(B, T, HKV)), ValueError, "causal=False has no order"),
    (lambda *x: hla.linear_attn(*x, causal=False, backend="triton"), ValueError, "causal=False is two matrix products"),
    (
        lambda *x: hla.linear_attn(*x, causal=False, backend="cuda"),
        ValueError,
        "backend must be None, 'torch' or 'triton'",
    ),
    (lambda *x: hla.linear_attn(*x, causal=False, output_final_state=True), ValueError, "causal=False has no order"),
]


@pytest.mark.parametrize("call,error,message", ORDERS)
def test_bad_orders_and_variants_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*good().values())


STEPS = [
    (dict(op="hla4"), ValueError, "op must be one of linear_attn, hla2, ahla, hla3, hla_n, hla_q; got 'hla4'"),
    (dict(q=r(B, K)), ValueError, r"q must have shape \[B, heads, dim\] or, for several tokens, \[B, T, heads, dim\]"),
    (dict(q=r(B, 1, HQ, K)), ValueError, r"k must have shape \[B, T, heads, dim\]"),
    (
        dict(q=r(B, 9, HQ, K), k=r(B, 9, HKV, K), v=r(B, 9, HKV, V)),
        ValueError,
        "takes 1 to 8 tokens in one call; got T = 9.*hla.hla2",
    ),
    (
        dict(q=r(B, 0, HQ, K), k=r(B, 0, HKV, K), v=r(B, 0, HKV, V)),
        ValueError,
        "takes 1 to 8 tokens in one call; got T = 0",
    ),
    (dict(state=zeros("hla2", 3, HQ, HKV, K, V).pack()), ValueError, r"state\.S must have shape \[2, 2, 1, 16, 16\]"),
    (dict(state=state(), out_state=state().pack()), ValueError, r"out_state\.S must be packed where state\.S is"),
    (dict(state=state().pack(), out_state=state()), ValueError, r"out_state\.S must be packed where state\.S is"),
    (dict(order=2), ValueError, "hla2 has no argument order"),
    (dict(op="hla_n"), ValueError, "hla_n needs the argument order"),
    (dict(g=-torch.rand(B, 1, HKV)), ValueError, r"g must have shape \[2, 2\]"),
    (dict(state=AHLAState(r(1), r(1))), TypeError, "state of hla2 must be a HLA2State"),
    (dict(state=zeros("hla2", 3, HQ, HKV, K, V)), ValueError, r"state\.S must have shape"),
    (dict(out_state=zeros("hla2", 3, HQ, HKV, K, V)), ValueError, r"out_state\.S must have shape"),
    (dict(state_indices=torch.tensor([0, 1])), ValueError, "state_indices picks rows of state, which is None"),
    (dict(state=state(), state_indices=torch.tensor([0.0, 1.0])), TypeError, "state_indices must be int32 or int64"),
    (
        dict(state=state(), state_indices=torch.zeros(2, dtype=torch.long, device="meta")),
        ValueError,
        "state_indices must have the device",
    ),
    (dict(state=state(), state_indices=torch.tensor([0])), ValueError, r"state_indices must have shape \[2\]"),
    (dict(state=state(), state_indices=torch.tensor([0, 2])), ValueError, "state_indices must lie in 0 .. 1"),
    (dict(state=state(), state_indices=torch.tensor([0, -1])), ValueError, "state_indices must lie in 0 .. 1"),
    (dict(state=state(), state_indices=torch.tensor([1, 1])), ValueError, "must not name a slot twice"),
    (dict(state=5, state_indices=torch.tensor([1, 1])), TypeError, "state of hla2 must be a HLA2State"),
]


@pytest.mark.parametrize("changes,error,message", STEPS)
def test_bad_steps_are_named(changes, error, message):
    kw = dict(op="hla2", q=r(B, HQ, K), k=r(B, HKV, K), v=r(B, HKV, V), state=None) | changes
    with pytest.raises(error, match=message):
        hla.step(kw.pop("op"), kw.pop("q"), kw.pop("k"), kw.pop("v"), kw.pop("state"), **kw)


def test_only_a_step_takes_a_packed_state():
    with pytest.raises(ValueError, match=r"initial_state\.S is packed.*use initial_state\.unpack\(\)"):
        hla.hla2(**good(initial_state=state().pack()))
    segment = summarize("hla2", **good())
    with pytest.raises(ValueError, match=r"state\.S is packed.*use state\.unpack\(\)"):
        advance(state().pack(), segment)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton' needs tensors on a CUDA device; these are on 'cpu'"):
        hla.hla2(**good(backend="triton"))
    with pytest.raises(ValueError, match="backend 'triton' has no float64 kernels; use backend 'torch'"):
        dispatch("hla2", "chunk", "triton", torch.device("cuda"), torch.float64)
    with pytest.raises(ValueError, match="backend 'triton' has no recurrent form of hla2 on cuda; available: torch"):
        dispatch("hla2", "recurrent", "triton", torch.device("cuda"))
    monkeypatch.setattr("hla.ops.HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        hla.hla2(**good(backend="triton"))


def test_a_registered_kernel_is_used(monkeypatch):
    """One line in the table is all a kernel needs; the default backend of a device takes it, the other stays as it is."""
    from hla.ops import DISPATCH

    monkeypatch.setattr("hla.ops.HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(DISPATCH, ("hla2", "chunk", "triton"), lambda call: ("fused", None))
    assert hla.hla2(**good(backend="triton"))[0] == "fused"
    assert isinstance(hla.hla2(**good())[0], torch.Tensor)
    assert dispatch("hla2", "chunk", None, torch.device("cuda"))(None)[0] == "fused"
    assert dispatch("hla2", "chunk", None, torch.device("cuda"), torch.float64) is DISPATCH["hla2", "chunk", "torch"]
    monkeypatch.delitem(DISPATCH, ("ahla", "chunk", "triton"))
    monkeypatch.setitem(DISPATCH, ("la", "chunk", "triton"), lambda *args, **kw: ("primitive", None))
    assert hla.ahla(*good().values(), backend="triton")[0] == "primitive"


def test_values_on_other_devices_are_not_read():
    """Meta tensors have no values; the check of g must not ask for them."""
    q, k, v = (x.to("meta") for x in good().values())
    call = hla.ops.checks.check_call("hla2", q, k, v, g=torch.empty(B, T, HKV, device="meta"))
    assert call.scale == K**-0.5


def test_nan_decays_are_seen_in_the_outputs():
    """A model that diverged computes NaN decays: its loss must say so, as after a NaN in q, k or v."""
    g = -torch.rand(1, 9, 2)
    g[:, 4] = float("nan")
    q, k, v = (torch.randn(1, 9, 2, 4) for _ in range(3))
    for op in (hla.linear_attn, hla.hla2, hla.hla_q):
        o, _ = op(q, k, v, g=g)
        assert o[:, 4:].isnan().all()
