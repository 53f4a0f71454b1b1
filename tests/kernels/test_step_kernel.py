"""The fused decode step equals the PyTorch step: on a GPU compiled, elsewhere in Triton's interpreter."""

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which the next line does

from hla.kernels import step as kernel  # noqa: E402
from hla.ops import recurrent  # noqa: E402
from hla.ops.checks import Call, check_call  # noqa: E402
from tests.ops.cases import CASES, Inputs, assert_close, assert_states_close  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of the same float32 products in another order. hla_q subtracts what nearly cancels: from the empty state, either
# form is a few 1e-6 away from float64.
ROUNDING = 2e-6
ROUNDING_HLA_Q = 2e-5  # kernel and PyTorch form are each up to 6e-6 from float64, in their own directions

HAVE_KERNELS = [(n, o) for n, o in CASES if n not in ("ahla3", "hla_n4", "hla_n5")]
# Every path through the kernels: the switches alone and together, and the query side.
PATHS = {
    "linear_attn": {},
    "hla2": dict(ridge=0.3),
    "ahla": dict(gain=-0.7),
    "hla3": dict(ridge=0.3, value_ridge=0.4),
    "hla_q": dict(order=3, ridge=0.5),
}
path = pytest.mark.parametrize("op", PATHS)


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make(op: str, *, B=2, T=None, HQ=4, HKV=2, K=19, V=21, dtype=torch.float32, gate=True, **kw) -> Call:
    """A call with random inputs, of one token or of T."""
    lead = (B,) if T is None else (B, T)
    q, k, v = (torch.randn(*lead, H, D, device=DEVICE).to(dtype) for H, D in ((HQ, K), (HKV, K), (HKV, V)))
    g = -torch.rand(*lead, HKV, device=DEVICE) if gate else None
    return check_call(op, q, k, v, g=g, step=True, **{**PATHS[op], **kw})


def like(state, function):
    return type(state)(*(None if x is None else function(x) for x in state))


def some_state(call: Call, rows: int = 2):
    """A state as tokens would leave it: S is symmetric and nonnegative, the rest is anything."""
    state = like(recurrent.empty_state(call, rows), torch.randn_like)
    if getattr(state, "S", None) is None:
        return state
    return state._replace(S=state.S @ state.S.mT)


def assert_equals_torch(call: Call, state, tolerance: float = 0.0):
    """In one call, which the PyTorch form goes through token by token; the kernel may be given a packed state."""
    o, new = kernel.fused_step(call, state)
    truth, true_state = recurrent.update_all(call, state if state is not None else recurrent.empty_state(call, 2))
    assert o.dtype == truth.dtype
    assert_close(o, truth, max(tolerance, ROUNDING_HLA_Q if call.op == "hla_q" else ROUNDING), "o")
    assert_states_close(new, true_state, ROUNDING)


@pytest.mark.parametrize("name,option", HAVE_KERNELS)
def test_kernel_equals_the_pytorch_step(name, option):
    x = Inputs(name, option, T=1, dtype=torch.float32, K=19, V=21)
    at = lambda y: (y[:, 0] if y.dim() > 2 else y).to(DEVICE) if isinstance(y, Tensor) else y  # noqa: E731
    kw = {n: at(y) for n, y in x.kw.items()}
    call = check_call(x.op, at(x.q), at(x.k), at(x.v), step=True, **kw)
    assert kernel.supports(call)
    state = some_state(call)
    if call.normalize:  # a denominator far from zero, or rounding is all that is left
        state = like(state, torch.abs)
    assert_equals_torch(call, state)


@pytest.mark.parametrize("name,option", HAVE_KERNELS)
def test_several_tokens_in_one_launch(name, option):
    """Every tensor per token is read at its token."""
    x = Inputs(name, option, T=3, dtype=torch.float32, K=19, V=21)
    on = lambda y: y.to(DEVICE) if isinstance(y, Tensor) else y  # noqa: E731
    call = check_call(x.op, on(x.q), on(x.k), on(x.v), step=True, **{n: on(y) for n, y in x.kw.items()})
    assert kernel.supports(call)
    state = some_state(call)
    assert_equals_torch(call, like(state, torch.abs) if call.normalize else state)


@path
@pytest.mark.parametrize("T,HQ,HKV,p", [(1, 1, 1, "q"), (2, 6, 2, "q"), (8, 3, 1, "k")])
def test_any_number_of_tokens_and_grouped_heads(op, T, HQ, HKV, p):
    p = {} if op in ("linear_attn", "hla_q") else dict(p=p)
    call = make(op, T=T, HQ=HQ, HKV=HKV, **p)
    assert_equals_torch(call, some_state(call))


@path
def test_several_tokens_of_a_bfloat16_state_round_it_once(op):
    call = make(op, T=3, K=32, V=32)
    state = like(some_state(call), Tensor.bfloat16)
    o, _ = kernel.fused_step(call, state, like(state, Tensor.clone))
    truth, _ = kernel.fused_step(call, like(state, Tensor.float))
    # Rounded between tokens it would be 1e-3 off; two compiled kernels add in their own ways.
    torch.testing.assert_close(o, truth, rtol=1e-4, atol=1e-5)


packs = pytest.mark.parametrize("op", [op for op in PATHS if op not in ("linear_attn", "ahla")])


@pytest.mark.parametrize("op", ["hla2", "hla3"])
@pytest.mark.parametrize("K,V", [(16, 16), (40, 21), (130, 5)])
def test_a_packed_state_with_one_reader(op, K, V):
    call = make(op, HQ=2, HKV=2, K=K, V=V)
    assert_equals_torch(call, some_state(call).pack())


@packs
@pytest.mark.parametrize("T,K,V", [(3, 5, 3), (None, 16, 16), (2, 40, 21), (None, 130, 5)])
@pytest.mark.parametrize("few", [0, 264])
def test_packed_states_in_both_block_sizes(op, T, K, V, few, monkeypatch):
    monkeypatch.setattr(kernel, "FEW_PROGRAMS", few)
    call = make(op, T=T, HQ=2, HKV=1, K=K, V=V)
    assert_equals_torch(call, some_state(call).pack())


@packs
@pytest.mark.parametrize("HQ,HKV,p", [(1, 1, "q"), (6, 2, "q"), (6, 2, "k")])
def test_packed_states_with_grouped_heads(op, HQ, HKV, p):
    p = {} if op == "hla_q" else dict(p=p)
    call = make(op, T=2, HQ=HQ, HKV=HKV, K=20, **p)
    assert_equals_torch(call, some_state(call).pack())


@pytest.mark.parametrize("op", ["hla2", "hla3"])
def test_packed_states_normalised_and_with_numbers_per_token(op):
    q, k, v = (torch.rand(2, 3, H, D, device=DEVICE) for H, D in ((4, 20), (2, 20), (2, 21)))
    ridge, gain = torch.rand(2, 2, 3, 4, device=DEVICE)
    call = check_call(op, q, k, v, normalize=True, eps=0.5, ridge=ridge, gain=gain, step=True)
    assert_equals_torch(call, like(some_state(call), torch.abs).pack())


@pytest.mark.parametrize("T", [None, 3])
def test_hla_q_keeps_a_large_S_in_memory(T, monkeypatch):
    """In blocks of rows, here of a small one: written and read again by every token."""
    monkeypatch.setattr(kernel, "RESIDENT", 32)
    call = make("hla_q", T=T, K=40, V=5, HQ=2, HKV=1)
    assert_equals_torch(call, some_state(call))
    assert_equals_torch(call, some_state(call).pack())


@pytest.mark.parametrize("name", ["hla_n2", "hla_n3"])
@pytest.mark.parametrize("normalize", [False, True])
def test_orders_of_hla_n_that_are_hla2_and_hla3(name, normalize):
    q, k, v = (torch.rand(2, H, D, device=DEVICE) for H, D in ((4, 19), (2, 19), (2, 21)))
    call = check_call(
        "hla_n", q, k, v, order=int(name[-1]), normalize=normalize, eps=0.5, ridge=0.3, gain=0.7, step=True
    )
    assert_equals_torch(call, like(some_state(call), torch.abs))


@pytest.mark.parametrize("order", [1, 4])
def test_without_nodes_the_kernel_makes_chebyshevs(order):
    call = make("hla_q", order=order)
    state = some_state(call)
    truth, _ = kernel.fused_step(call, state)
    call.nodes = None
    o, _ = kernel.fused_step(call, state)
    assert_close(o, truth, ROUNDING_HLA_Q)


@path
@pytest.mark.parametrize("HQ,HKV,p", [(1, 1, "q"), (6, 2, "q"), (6, 2, "k"), (5, 1, "k"), (3, 3, "q")])
def test_grouped_heads(op, HQ, HKV, p):
    p = {} if op in ("linear_attn", "hla_q") else dict(p=p)
    call = make(op, HQ=HQ, HKV=HKV, **p)
    assert_equals_torch(call, some_state(call))


@path
@pytest.mark.parametrize("K,V", [(1, 1), (3, 70), (130, 5), (64, 48), (33, 256)])
@pytest.mark.parametrize("few", [0, 264])
def test_any_head_size_and_both_block_sizes(op, K, V, few, monkeypatch):
    monkeypatch.setattr(kernel, "FEW_PROGRAMS", few)
    call = make(op, K=K, V=V, B=1, HQ=2, HKV=1)
    assert_equals_torch(call, some_state(call, 1))


@pytest.mark.parametrize("op", [op for op in PATHS if op != "hla_q"])
def test_normalised_in_both_block_sizes(op, monkeypatch):
    for few in (0, 264):
        monkeypatch.setattr(kernel, "FEW_PROGRAMS", few)
        call = make(op, V=70, K=40, normalize=True, eps=0.5)
        for name in ("q", "k", "v"):
            setattr(call, name, getattr(call, name).abs())
        call.p = call.q
        call.gain = call.ridge = call.value_ridge = 0.3 if op != "linear_attn" else 0.0
        assert_equals_torch(call, like(some_state(call), torch.abs))


@path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(op, dtype):
    """Inputs are widened exactly, so that only the rounding of o is left."""
    call = make(op, dtype=dtype, K=32, V=24)
    assert_equals_torch(call, some_state(call), torch.finfo(dtype).eps)


@path
def test_the_empty_state(op):
    assert_equals_torch(make(op), None)


@path
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("T,packed", [(None, False), (3, True)])
def test_in_place_equals_out_of_place(op, normalize, T, packed):
    call = make(op, T=T, HQ=6, normalize=normalize and op != "hla_q", eps=0.5)
    before = some_state(call)
    if packed and hasattr(before, "pack"):
        before = before.pack()
    kept = like(before, Tensor.clone)
    o, new = kernel.fused_step(call, before)
    assert_states_close(before, kept, 0.0)
    addresses = [x.data_ptr() for x in before if x is not None]
    o2, returned = kernel.fused_step(call, before, before)
    assert returned is before and addresses == [x.data_ptr() for x in before if x is not None]
    assert torch.equal(o, o2)
    assert_states_close(before, new, 0.0)


@path
@pytest.mark.parametrize("dtype,T,packed", [(torch.int32, None, False), (torch.int64, 3, True)])
def test_slots(op, dtype, T, packed):
    """Rows picked by state_indices advance as they would alone; the others are untouched."""
    call = make(op, T=T)
    index = torch.tensor([[3, 0], [1, 0]], dtype=dtype, device=DEVICE)[:, 0]  # not contiguous
    slots = some_state(call, 5)
    if packed and hasattr(slots, "pack"):
        slots = slots.pack()
    before = like(slots, Tensor.clone)
    o, alone = kernel.fused_step(call, like(slots, lambda x: x[index.long()]))
    o2, copy = kernel.fused_step(call, slots, None, index)
    assert_states_close(slots, before, 0.0)
    o3, other = kernel.fused_step(call, slots, like(slots, lambda x: torch.full_like(x, 7)), index)
    o4, same = kernel.fused_step(call, slots, slots, index)
    assert all(torch.equal(o, x) for x in (o2, o3, o4)) and same is slots
    for fields in zip(alone, before, copy, slots, other, strict=True):
        if fields[0] is None:
            continue
        advanced, old, *written, out = fields
        for x in (*written, out):
            assert torch.equal(x[[3, 1]], advanced)
        for x in written:
            assert torch.equal(x[[0, 2, 4]], old[[0, 2, 4]])
        assert (out[[0, 2, 4]] == 7).all()


@path
def test_slots_may_start_empty(op):
    call = make(op)
    slots = some_state(call, 5)
    before = like(slots, Tensor.clone)
    o, new = kernel.fused_step(call, None)
    o2, _ = kernel.fused_step(call, None, slots, torch.tensor([3, 1], device=DEVICE))
    assert torch.equal(o, o2)
    for x, y, old in zip(new, slots, before, strict=True):
        assert x is None or (torch.equal(y[[3, 1]], x) and torch.equal(y[[0, 2, 4]], old[[0, 2, 4]]))


@path
def test_strided_inputs_and_states(op):
    """Views into one projection, a last dimension with gaps, and the rows of one layer of a cache of all layers."""
    call = make(op, K=16, V=16, HQ=2)
    cache = like(some_state(call), lambda x: torch.stack([x, x, x], 1))
    layer = like(cache, lambda x: x[:, 1])
    assert not any(x.is_contiguous() for x in layer if x is not None) and kernel.supports(call, layer)
    truth, true_state = recurrent.update(call, layer)

    together = torch.cat([call.q, call.k, call.v], 1)
    call.q, call.k = together[:, :2], together[:, 2:4]
    call.p = call.q
    call.v = torch.stack([call.v, call.v], -1)[..., 0]
    call.g = torch.stack([call.g, call.g], -1)[..., 0]
    before = like(cache, Tensor.clone)
    o, _ = kernel.fused_step(call, layer, layer)
    assert_close(o, truth, ROUNDING)
    assert_states_close(layer, true_state, ROUNDING)
    for x, y in zip(cache, before, strict=True):
        assert x is None or (torch.equal(x[:, 0], y[:, 0]) and torch.equal(x[:, 2], y[:, 2]))


@path
def test_strided_inputs_of_several_tokens(op):
    """Cut from one projection of more tokens, and with the tokens in front of the batch."""
    call = make(op, T=3, K=16, V=16, HQ=2)
    state = some_state(call)
    truth, true_state = recurrent.update_all(call, state)
    together = torch.cat([call.q, call.k, call.v], 2).transpose(0, 1).contiguous().transpose(0, 1)
    longer = torch.cat([torch.ones_like(together), together], 1)[:, 3:]
    call.q, call.k, call.v = longer[:, :, :2], longer[:, :, 2:4], together[:, :, 4:]
    call.p = call.q
    call.g = call.g.mT.contiguous().mT
    o, new = kernel.fused_step(call, state)
    assert_close(o, truth, ROUNDING_HLA_Q if op == "hla_q" else ROUNDING)
    assert_states_close(new, true_state, ROUNDING)


@path
def test_states_in_bfloat16_are_rounded_once(op):
    """Outputs come from the state before it is rounded. (The interpreter cuts off where a GPU rounds to nearest.)"""
    call = make(op, K=32, V=32)
    state = like(some_state(call), Tensor.bfloat16)
    o, new = kernel.fused_step(call, state)
    truth, true_state = kernel.fused_step(call, like(state, Tensor.float))
    assert_close(o, truth, ROUNDING_HLA_Q if op == "hla_q" else ROUNDING)  # (on a card they are two compilations)
    for x, y in zip(new, true_state, strict=True):
        if x is not None:
            assert x.dtype == torch.bfloat16
            torch.testing.assert_close(x.float(), y, rtol=2**-8 if DEVICE == "cuda" else 2**-7, atol=1e-6)


def test_what_is_left_to_pytorch():
    refused = [make("ahla", order=3), make("ahla")]
    refused[1].q = refused[1].q.requires_grad_()
    q = torch.randn(2, 2, 8, device=DEVICE)
    refused += [check_call("hla_n", q, q, q, order=n, step=True) for n in (4, 5)]
    refused += [check_call("hla2", q.double(), q.double(), q.double(), step=True)]
    assert not any(kernel.supports(call) for call in refused)
    with torch.no_grad():
        assert kernel.supports(refused[1])
    call = make("hla2", K=16, V=16)
    assert not kernel.supports(call, like(some_state(call), lambda x: x.mT.contiguous().mT))
    assert [kernel.supports(check_call(op, q, q, q, order=1, step=True)) for op in ("ahla", "hla_n")] == [True] * 2


def test_no_rows():
    call = make("hla2", B=0)
    o, state = kernel.fused_step(call, None)
    assert o.shape == (0, 4, 21) and state.S.shape[0] == 0


@path
@pytest.mark.parametrize("T,packed", [(None, False), (2, True)])
def test_under_torch_compile_without_a_graph_break(op, T, packed):
    """In place and in slots: what the operator writes is declared, so that the compiled call writes it too."""
    call = make(op, T=T, K=8, V=8)
    index = torch.tensor([3, 1], device=DEVICE)

    def run(q, k, v, state):
        c = check_call(op, q, k, v, g=call.g, step=True, **PATHS[op])
        assert kernel.supports(c, state)
        return kernel.fused_step(c, state, state, index)[0] * 2

    eager = some_state(call, 5)
    if packed and hasattr(eager, "pack"):
        eager = eager.pack()
    compiled = like(eager, Tensor.clone)
    truth = run(call.q, call.k, call.v, eager)
    o = torch.compile(run, fullgraph=True, backend="aot_eager")(call.q, call.k, call.v, compiled)
    assert torch.equal(o, truth)
    assert_states_close(compiled, eager, 0.0)


@path
def test_the_operator_keeps_its_schema(op, monkeypatch):
    """It writes what it says it writes, returns nothing of what it was given, and its fake has the right shape."""
    seen = []
    monkeypatch.setattr(kernel, "_launch", lambda *args: seen.append(args) or args[2].new_zeros(2, 1, 4, 8))
    call = make(op, K=8, V=8)
    state = some_state(call)
    kernel.fused_step(call, state, state)
    kernel.fused_step(call, state)
    monkeypatch.undo()
    for args in seen:
        torch.library.opcheck(torch.ops.hla.step.default, args, test_utils=("test_schema", "test_faketensor"))


def test_only_steps_in_place_and_without_slots_ask_for_the_state_before_they_wait(monkeypatch):
    """And only where someone says that the launch before them does not write it."""
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, **options: seen.append((options["PDL"], options.get("launch_pdl", False)))

    monkeypatch.setattr(kernel, "query_side_kernel", Recorder())
    call = make("hla_q")
    state, index = some_state(call), torch.tensor([1, 0], device=DEVICE)
    with kernel.overlapping():
        kernel.fused_step(call, state, state)
        kernel.fused_step(call, state)
        kernel.fused_step(call, state, state, index)
        with kernel.overlapping(False):
            kernel.fused_step(call, state, state)
    kernel.fused_step(call, state, state)
    assert seen == [(True, True), *[(False, False)] * 4]


@pytest.mark.parametrize("B", [1, 300])
@pytest.mark.parametrize("K,V", [(16, 16), (16, 128), (48, 80), (80, 48), (128, 16), (128, 128), (96, 256)])
def test_head_sizes_have_a_number_of_warps_that_there_is(B, K, V, monkeypatch):
    warps = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *_, **options: warps.append(options["num_warps"])

    monkeypatch.setattr(kernel, "query_side_kernel", Recorder())
    monkeypatch.setattr(kernel, "step_kernel", Recorder())
    for op in ("hla_q", "hla2", "linear_attn"):
        kernel.fused_step(make(op, B=B, K=K, V=V), None)
    assert all(n in (1, 2, 4, 8, 16) for n in warps) and len(warps) == 3
