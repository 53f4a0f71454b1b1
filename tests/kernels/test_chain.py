"""The Triton kernels, run by Triton's interpreter on the CPU, equal the float64 chunk form: outputs, states, gradients.

(tests/gpu runs the same kernels compiled, at sizes the interpreter would take hours for.)
"""

import mmap
import sys
from dataclasses import replace

import pytest
import torch

import hla

pytest.importorskip("triton")
from hla.kernels import linear_attn, pairs, query_side, segments
from hla.kernels.chain import chain
from hla.ops.checks import check_call
from hla.ops.linear_attn import Stage
from hla.ops.linear_attn import chain as torch_chain
from tests.ops.cases import CASES, F64, Inputs, assert_close, gradients

SHAPES = {  # several chunks, the last one not full; head sizes are not powers of two
    "grouped": dict(B=1, T=70, HQ=2, HKV=1, K=3, V=20),
    "split": dict(B=1, T=130, HQ=1, HKV=1, K=17, V=5),
    "whole": dict(B=1, T=60, HQ=2, HKV=1, K=3, V=5),
}


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 64)


def results(x: Inputs, dtype, backend, cu_seqlens=None, initial_state=None, final=True, fixed=()):
    """Output, final state and gradients of everything but what is ``fixed``, the final state having one too."""
    leaves = {
        n: y.detach().to(dtype if n != "g" or dtype == F64 else torch.float32).requires_grad_(n not in fixed)
        for n, y in x.tensors().items()
    }
    q, k, v, kw = x.with_tensors(leaves)
    states = []
    if initial_state is not None:
        states = [y.detach().to(dtype).requires_grad_() for y in initial_state if y is not None]
        rest = iter(states)
        initial_state = type(initial_state)(*(None if y is None else next(rest) for y in initial_state))
    o, state = getattr(hla, x.op)(
        q, k, v, **kw, initial_state=initial_state, output_final_state=final, cu_seqlens=cu_seqlens, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    new = lambda y: torch.randn(y.shape, dtype=F64, generator=generator).to(y.dtype)  # noqa: E731
    total = (o * new(o)).sum()
    for y in flat(state):
        total = total + 0.1 * (y * new(y)).sum()
    leaves = {n: y for n, y in leaves.items() if y.requires_grad}
    return o, state, gradients(total, [*leaves.values(), *states]), [*leaves, *range(len(states))]


def flat(state):
    """All tensors of a state, tuples of tensors among its fields included."""
    for y in state or ():
        yield from (z for z in (y if isinstance(y, tuple) else (y,)) if z is not None)


SPLIT_OPTIONS = ("plain", "g", "g,p=k,per token", "g,normalize,ridge", "value_ridge,value_gain")


def covered(name: str, option: str, shape: str) -> bool:
    """What a split does depends on few options, and small whole sequences have kernels of their own up to order 3."""
    return {
        "grouped": True,
        "split": option in SPLIT_OPTIONS,
        "whole": name in ("hla2", "ahla", "hla3") and option in SPLIT_OPTIONS,
    }[shape]


# Stages are all that the kernels see of an operator, so cases with the same stages are one case. These are left out,
# each for the one beside it: first order is `linear_attn`, and a gain or a scale alone is a number in the place of
# another. `test_what_is_left_out_is_the_same_problem` compares what the kernels are given. All go through the chunk
# form in tests/ops/test_laws.py.
SAME = (
    {
        (name, option): ("linear_attn", "g" if option.startswith("g") and option != "gain" else "plain")
        for name in ("ahla1", "hla_n1")
        for option in ("plain", "g", "p=k", "ridge", "gain", "ridge,gain per token", "g,p=k,per token", "scale")
    }
    | {("ahla1", "normalize"): ("linear_attn", "normalize"), ("hla_n1", "normalize"): ("linear_attn", "normalize")}
    | {("hla_n1", option): ("ahla1", option) for option in ("p=HQ", "p=HKV", "g,normalize,ridge")}
    | {
        (name, option): (name, "plain")
        for name in ("ahla", "ahla3", "hla_n4", "hla_n5")
        for option in ("gain", "scale")
    }
    | {("linear_attn", "scale"): ("linear_attn", "plain")}
    | {("hla2", "scale"): ("hla2", "plain"), ("hla3", "gain"): ("hla3", "plain")}
)
del SAME["hla_n1", "g"]  # one of each operator stays


@pytest.mark.parametrize(
    "name,option,shape", [(*c, s) for c in CASES for s in SHAPES if covered(*c, s) and c not in SAME]
)
def test_equal_the_float64_chunk_form(name, option, shape, short_segments):
    check(Inputs(name, option, **SHAPES[shape]))


class Given(Exception):
    """Raised in the place of running kernels; its argument is what they would have been given."""


def given(name: str, option: str, shape: str, monkeypatch) -> tuple:
    """Stages, operands and shapes that reach the kernels, and which of them need gradients, without the constants."""

    def number(x):
        return x if isinstance(x, str) or x in (0, 1) else "a number"

    def stop(stages, tensors, per_token, g, **more):
        stages = [
            replace(s, gain=number(s.gain), residuals=tuple((number(x), of) for x, of in s.residuals)) for s in stages
        ]
        names = [next(n for n, y in tensors.items() if y is x) for x in tensors.values()]  # one tensor in two roles
        operands = [(n, x.shape, x.dtype, x.requires_grad) for n, x in (*tensors.items(), *per_token.items(), ("g", g))
                    if x is not None]  # fmt: skip
        initial = [x is not None for x in more["initial_states"]]
        raise Given(stages, names, operands, initial, more["outputs"], more["output_final_states"])

    x = Inputs(name, option, **SHAPES[shape])
    _, state, _, _ = results(x, F64, "torch")
    with monkeypatch.context() as patch, pytest.raises(Given) as found:
        patch.setattr("hla.kernels.chain", stop)
        results(x, torch.float32, "triton", initial_state=state)
    return found.value.args


@pytest.mark.parametrize("name,option", SAME)
def test_what_is_left_out_is_the_same_problem(name, option, monkeypatch):
    other = SAME[name, option]
    assert other in CASES and other not in SAME
    for shape in SHAPES:
        if covered(name, option, shape):
            assert covered(*other, shape)
            assert given(name, option, shape, monkeypatch) == given(*other, shape, monkeypatch)


@pytest.mark.parametrize("name,option", [c for c in CASES if c[0].startswith("hla_q")])
def test_hla_q_has_kernels_of_its_own(name, option):
    x = Inputs(name, option, **SHAPES["grouped"])
    assert query_side.supports(check_call(x.op, x.q, x.k, x.v, **x.kw))


@pytest.mark.parametrize("name", ["hla2", "hla_q4"])
@pytest.mark.parametrize("fixed", ["g", "k", "q"])
def test_what_needs_no_gradient_changes_no_other(name, fixed, short_segments):
    check(Inputs(name, "g", **SHAPES["split"]), fixed=(fixed,))


@pytest.mark.parametrize("shape", ["grouped", "split"])
def test_where_pairs_do_not_fit_walks_read_P_and_give_the_same_gradients(shape, short_segments, monkeypatch):
    walked = []
    monkeypatch.setattr(query_side, "fits", lambda K, V, dtype: walked.append(V))
    check(Inputs("hla_q4", "g", **SHAPES[shape]))
    assert walked


@pytest.mark.parametrize(
    "name,option", [("linear_attn", "g"), ("hla2", "g,normalize,ridge"), ("hla3", "g"), ("ahla", "g")]
)
@pytest.mark.parametrize("shape", ["grouped", "split"])
def test_stages_of_which_pairs_do_not_fit_walk_and_give_the_same_gradients(
    name, option, shape, short_segments, monkeypatch
):
    """The gradient of the gate then is a sum to the end, of dots. (One stage of three alone: both in one sum.)"""
    fits, asked = pairs.fits, []
    monkeypatch.setattr(pairs, "fits", lambda K, V, dtype: asked.append(V) or (name == "hla3" and K == V))
    x = Inputs(name, option, **SHAPES[shape])
    check(x)
    assert asked
    monkeypatch.setattr(pairs, "fits", fits)
    launches = []
    monkeypatch.setattr(pairs, "launch", lambda *a, f=pairs.launch, **k: (launches.append(a[0]), f(*a, **k)))
    check(x)
    assert launches.count(pairs.pair_gradients) == {"linear_attn": 1, "ahla": 2}.get(name, 3)


def check(x: Inputs, **more):
    _, initial, _, _ = results(x, F64, "torch")
    initial = initial if not any(isinstance(y, tuple) for y in initial) else None
    o, state, grads, names = results(x, torch.float32, "triton", initial_state=initial, **more)
    o_true, state_true, grads_true, _ = results(x, F64, "torch", initial_state=initial, **more)
    assert_close(o, o_true, 3e-5, "o")
    for a, b in zip(flat(state), flat(state_true), strict=True):
        assert_close(a, b, 3e-5, "state")
    for n, a, b in zip(names, grads, grads_true, strict=True):
        assert_close(a, b, 1e-4, f"d{n}")


@pytest.mark.parametrize("name,option", [("hla2", "g"), ("hla3", "plain"), ("hla_q4", "g,nodes,ridge per token")])
@pytest.mark.parametrize("shortest", [64, 256])
def test_packed_sequences_equal_the_chunk_form(name, option, shortest, monkeypatch):
    """Also empty ones, and ones that end inside a chunk; split into segments and whole."""
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", shortest)
    cu = torch.tensor([0, 3, 3, 70, 200], dtype=torch.int32)
    x = Inputs(name, option, B=1, T=200, HQ=2, HKV=1, K=3, V=5)
    _, initial, _, _ = results(x, F64, "torch", cu_seqlens=cu)
    o, state, grads, names = results(x, torch.float32, "triton", cu, initial)
    o_true, state_true, grads_true, _ = results(x, F64, "torch", cu, initial)
    for n, a, b in zip(
        ["o", *("state" for _ in flat(state)), *names],
        [o, *flat(state), *grads],
        [o_true, *flat(state_true), *grads_true],
        strict=True,
    ):
        assert_close(a, b, 1e-4, str(n))


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("where", ["nowhere", "forward", "backward"])
def test_a_split_finds_the_states_between_segments_once(where, final, short_segments, monkeypatch):
    """Unless one of the passes is `batch_invariant`, and cuts elsewhere."""
    monkeypatch.setattr(segments, "INVARIANT_SEGMENT", 128)
    found = []
    for owner in (pairs, linear_attn):
        monkeypatch.setattr(owner, "accumulate", lambda *a, f=owner.accumulate, **k: found.append(a[0]) or f(*a, **k))

    def run(dtype, backend):
        x = Inputs("hla_q4", "g", B=2, T=150, HQ=2, HKV=1, K=3, V=5)
        leaves = {n: y.to(dtype).requires_grad_() for n, y in x.tensors().items()}
        q, k, v, kw = x.with_tensors(leaves)
        with segments.batch_invariant(where == "forward"):
            o, state = hla.hla_q(q, k, v, **kw, output_final_state=final, backend=backend)
        forward = len(found)
        total = o.square().sum() + sum(y.square().sum() for y in flat(state))
        with segments.batch_invariant(where == "backward"):
            return [o, *gradients(total, leaves.values())], forward

    torch.manual_seed(0)
    results, forward = run(torch.float32, "triton")
    assert (forward, len(found) - forward) == (2, 1 if where == "nowhere" else 3)
    torch.manual_seed(0)
    for a, b in zip(results, run(F64, "torch")[0], strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize("mode", ["strict", "reversed"])
@pytest.mark.parametrize("T", [60, 150])
def test_all_modes_of_the_primitive_equal_the_chunk_form(mode, T, short_segments):
    r = lambda *s: torch.randn(*s, dtype=F64)  # noqa: E731
    x = {"q": r(1, T, 2, 3), "k": r(1, T, 1, 3), "v": r(1, T, 1, 5)}
    gain, g, S = r(1, T, 2), -r(1, T, 1).abs(), r(1, 1, 3, 5)
    do, dfinal = r(1, T, 2, 5), r(1, 1, 3, 5)
    stage = Stage("o", "q", "k", "v", gain="gain", mode=mode)
    found = []
    for run, dtype in ((chain, torch.float32), (torch_chain, F64)):
        leaves = [y.to(dtype).requires_grad_() for y in (*x.values(), gain, g, S)]
        (o,), (final,) = run(
            [stage], dict(zip(x, leaves, strict=False)), {"gain": leaves[3]}, leaves[4],
            outputs={"o": dtype}, initial_states=[leaves[5]],
        )  # fmt: skip
        total = (o * do.to(dtype)).sum() + (final * dfinal.to(dtype)).sum()
        found.append([o, final, *torch.autograd.grad(total, leaves)])
    for n, a, b in zip(("o", "final", "q", "k", "v", "gain", "g", "S"), *found, strict=True):
        assert_close(a, b, 1e-4, n)


@pytest.mark.parametrize("op,stages", [("linear_attn", "v"), ("hla2", "kv"), ("ahla", "vv"), ("hla3", "kvv")])
@pytest.mark.parametrize("V", [20, 40])
def test_one_walk_gives_the_gradients_of_keys_and_values_where_it_has_all_columns(op, stages, V, monkeypatch):
    """Of 32 here; stages: whose width they have. With a gate whose gradient is wanted there are dots, and two walks."""
    walks = []
    monkeypatch.setattr(pairs, "fits", lambda *_: False)  # (which gated stages would take)
    monkeypatch.setattr(linear_attn, "launch", lambda *a, f=linear_attn.launch, **k: (walks.append(a[0]), f(*a, **k)))
    torch.manual_seed(0)
    q, k = (torch.randn(1, 70, heads, 17) for heads in (2, 1))
    v, g = torch.randn(1, 70, 1, V), -torch.rand(1, 70, 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def gradients(*more: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o, _ = getattr(hla, op)(q, k, v, g=g if more else None, backend="triton")
        walks.clear()
        return torch.autograd.grad(o.square().sum(), (*leaves, *more))

    found, both = gradients(), len(walks)
    gradients(g.requires_grad_())
    together = len(stages) if V == 20 else stages.count("k")
    assert (both, len(walks)) == (3 * len(stages) - together, 3 * len(stages))
    monkeypatch.setattr(sys.modules["hla.kernels.chain"], "both_at_once", lambda *_: False)
    for a, b in zip(found, gradients(), strict=True):
        assert_close(a, b, 1e-6)


def test_a_batch_invariant_split_depends_on_the_length_alone():
    device = torch.device("cpu")
    alone = segments.cut(1, 5000, 1, None, device).segment
    assert segments.cut(64, 5000, 32, None, device).segment != alone
    with segments.batch_invariant():
        lengths = {
            segments.cut(B, T, P, None, device).segment for B, T, P in ((1, 5000, 1), (64, 5000, 32), (2, 100, 4))
        }
        packed = segments.cut(1, 9000, 7, torch.tensor([0, 4000, 9000]), device).segment
    assert lengths == {packed} == {segments.INVARIANT_SEGMENT}


def test_packed_segments_cover_every_token_once(short_segments):
    ends = [0, 0, 5, 69, 69, 133, 300]
    cut = segments.cut_every(64, 1, 300, torch.tensor(ends), torch.device("cpu"))
    rows = [row for row in cut.table.tolist() if row[0] >= 0]
    assert [t for _, start, stop, _ in rows for t in range(start, stop)] == list(range(300))
    for n, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
        own = [row for row in rows if row[0] == n]
        assert own == rows[cut.first[n] : cut.first[n + 1]]
        assert own[0][1] == start and own[-1][2] == stop
        assert [bool(row[3] & 1) for row in own] == [i == 0 for i in range(len(own))]
        assert [bool(row[3] & 2) for row in own] == [i == len(own) - 1 for i in range(len(own))]


@pytest.mark.parametrize("op,T", [("hla2", 20), ("hla_q", 20), ("hla_q", 130)])
def test_compiled_without_graph_breaks_they_compute_the_same(op, T, short_segments):
    def f(q, k, v, g):
        return getattr(hla, op)(2 * q, k, v, g=g, backend="triton")[0].square()

    q, k, v = (torch.randn(1, T, 1, 4, requires_grad=True) for _ in range(3))
    g = (-torch.rand(1, T, 1)).requires_grad_()
    found = []
    for function in (f, torch.compile(f, fullgraph=True)):
        o = function(q, k, v, g)
        found.append([o, *torch.autograd.grad(o.sum(), [q, k, v, g])])
    for a, b in zip(*found, strict=True):
        assert_close(b, a.double(), 1e-5)


def test_double_backward_is_refused():
    q, k, v = (torch.randn(1, 5, 1, 4, requires_grad=True) for _ in range(3))
    for op in ("hla2", "hla_q"):
        o, _ = getattr(hla, op)(q, k, v, backend="triton")
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(o.sum(), q, create_graph=True)


def test_the_gradient_of_an_output_that_a_later_stage_reads_is_not_written_to():
    r = lambda *s: torch.randn(*s, dtype=F64)  # noqa: E731
    x = {"q": r(1, 20, 1, 3), "k": r(1, 20, 1, 3), "v": r(1, 20, 1, 5)}
    given = [r(1, 20, 1, 5), r(1, 20, 1, 5)]
    stages = [Stage("v1", "q", "k", "v"), Stage("v2", "q", "k", "v1")]
    found = []
    for run, dtype in ((chain, torch.float32), (torch_chain, F64)):
        leaves = [y.detach().to(dtype, copy=True).requires_grad_() for y in x.values()]
        outputs, _ = run(
            stages, dict(zip(x, leaves, strict=True)), {}, None,
            outputs={"v1": dtype, "v2": dtype}, initial_states=[None, None],
        )  # fmt: skip
        douts = [y.to(dtype, copy=True) for y in given]
        found.append(torch.autograd.grad(outputs, leaves, douts))
        for y, z in zip(douts, given, strict=True):
            assert torch.equal(y, z.to(dtype))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only taken where it is touched")
@pytest.mark.parametrize("name", ["linear_attn", "hla2", "hla_q"])
def test_heads_may_lie_more_than_two_billion_numbers_apart(name):
    """As those of a long ``[B, H, T, D]`` do. An offset in 32 bits would point in front of the tensor, into zeros."""
    T, H, K, apart = 20, 3, 16, 2**30 + 1024
    MAP_NORESERVE = 0x4000  # (Python's mmap has had the name since 3.13)
    size = 2 * (2**31 + H * apart)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    base = torch.frombuffer(memory, dtype=torch.float16)
    inputs = [torch.randn(1, T, H, K).half().mul(0.3) for _ in range(3)]
    for far in range(3):
        views = list(inputs)
        views[far] = base.as_strided((1, T, H, K), (H * apart, K, apart, 1), 2**31)
        views[far].copy_(inputs[far])
        found = []
        for tensors in (views, inputs):
            leaves = [x.detach().requires_grad_() for x in tensors]
            o, _ = getattr(hla, name)(*leaves, backend="triton")
            found.append([o, *torch.autograd.grad(o.float().square().sum(), leaves)])
        for x, y in zip(*found, strict=True):
            assert torch.equal(x, y)
