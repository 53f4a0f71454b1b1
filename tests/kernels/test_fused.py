"""The fused kernel, run by Triton's interpreter, equals the float64 chunk form: outputs, states, what it keeps.

(Here it is called as a chain would call it; tests/gpu runs it compiled.)
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from hla.kernels import fused
from hla.kernels.chain import Plan
from hla.kernels.linear_attn import read
from hla.kernels.segments import cut
from hla.ops.checks import check_call
from hla.ops.higher_order import compose
from tests.ops.cases import F64, Inputs, assert_close, assert_states_close

SIZES = dict(B=1, T=70, HQ=2, HKV=1, K=16, V=20)  # several chunks, the last one not full
TOLERANCE = 3e-5  # of float32 numbers made from float64 ones, through up to three stages
OPS = ("hla2", "ahla", "hla3")
operators = pytest.mark.parametrize("op", OPS)


class Run:
    """The ``run`` of `compose` that must find the fused kernel; remembers what it was given and what it kept."""

    def __init__(self, keep: bool = True):
        self.keep = keep

    def __call__(
        self, stages, tensors, per_token, g, *, outputs, initial_states, cu_seqlens=None, output_final_states=True
    ):
        ((out, dtype),) = outputs.items()
        plan = Plan(
            tuple(stages), tuple(tensors), tuple(per_token), tuple(y is not None for y in initial_states),
            ((out, str(dtype)),), output_final_states,
        )  # fmt: skip
        pattern = fused.matches(plan)
        self.stages, self.x, self.g = stages, {**tensors, **per_token}, g
        self.shape = cut(*tensors["q"].shape[:2], 10**6, cu_seqlens, tensors["q"].device)
        assert pattern is not None and fused.fits(pattern, self.x, g, self.shape)
        passed = torch.float32 if dtype == torch.float32 else torch.bfloat16
        done = fused.fused(
            pattern, self.x, g, self.shape, initial=initial_states, final=output_final_states, keep=self.keep,
            out_dtype=dtype, kept_dtype=passed,
        )  # fmt: skip
        self.kept = dict(zip(plan.kept, done.kept, strict=self.keep))
        return [done.o], done.finals


def call(x: Inputs, dtype=torch.float32, run=None, **more):
    """o and final state, from the fused kernel."""
    tensors = {n: y.to(torch.float32 if n == "g" else dtype) for n, y in x.tensors().items()}
    q, k, v, kw = x.with_tensors(tensors)
    return compose(check_call(x.op, q, k, v, **kw, **more), run=run or Run())


def states_of(x: Inputs, **more):
    """A state to start from: any numbers (no symmetric S), with the strides of a transpose."""
    _, state = x.chunk(backend="torch", output_final_state=True, **more)
    return type(state)(*(None if y is None else torch.randn(y.mT.shape).mT for y in state))


@operators
@pytest.mark.parametrize("option", ["plain", "g", "g,p=k,per token", "p=HKV", "g,p=HQ,value"])
def test_equals_the_float64_chunk_form(op, option):
    x = Inputs(op, "plain" if option == "g,p=HQ,value" else option, **SIZES)
    if option == "g,p=HQ,value":
        r = lambda *s: torch.randn(*s, dtype=F64)  # noqa: E731
        x.kw |= dict(p=r(1, 70, 2, 16), g=-r(1, 70, 1).abs(), ridge=0.4, gain=-0.7)
        if op == "hla3":
            x.kw |= dict(value_ridge=r(1, 70, 2), value_gain=r(1, 70, 2))
    o, state = call(x, output_final_state=True)
    o_true, state_true = x.chunk(backend="torch", output_final_state=True)
    assert_close(o, o_true, TOLERANCE, "o")
    assert_states_close(state, state_true, TOLERANCE)


@operators
def test_continues_from_a_state_with_any_strides(op):
    x = Inputs(op, "g", **SIZES)
    initial = states_of(Inputs(op, "g", **SIZES, seed=1))
    o, state = call(x, initial_state=initial, output_final_state=True)
    exact = type(initial)(*(None if y is None else y.double() for y in initial))
    o_true, state_true = x.chunk(backend="torch", initial_state=exact, output_final_state=True)
    assert_close(o, o_true, TOLERANCE, "o")
    assert_states_close(state, state_true, TOLERANCE)
    o, state = call(x, run=Run(keep=False), initial_state=initial)
    assert_close(o, o_true, TOLERANCE, "o alone")
    assert state is None


@operators
def test_packed_sequences_know_nothing_of_each_other(op):
    x = Inputs(op, "g,p=k,per token", **SIZES)
    cu = torch.tensor([0, 3, 3, 40, 70])
    initial = states_of(x, cu_seqlens=cu)
    o, state = call(x, initial_state=initial, output_final_state=True, cu_seqlens=cu)
    exact = type(initial)(*(None if y is None else y.double() for y in initial))
    o_true, state_true = x.chunk(backend="torch", initial_state=exact, output_final_state=True, cu_seqlens=cu)
    assert_close(o, o_true, TOLERANCE, "o")
    assert_states_close(state, state_true, TOLERANCE)


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_what_stage_after_stage_passes_on(op, dtype):
    x = Inputs(op, "g", **SIZES)
    run = Run()
    o, _ = call(x, dtype, run)
    assert o.dtype == dtype
    assert list(run.kept) == {"hla2": ["k~"], "ahla": ["v1"], "hla3": ["k~", "v1"]}[op]
    for s in run.stages[:-1]:
        y = run.kept[s.out]
        staged = read(
            run.x[s.query], run.x[s.keys], run.x[s.values], run.g, run.shape, heads=2, gate=s.gate, factor=s.gain,
            out_dtype=y.dtype,
        )  # fmt: skip
        assert y.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
        assert_close(y, staged.o, TOLERANCE if dtype == torch.float32 else 2**-8, s.out)


def test_strided_inputs_of_one_projection():
    x = Inputs("hla3", "plain", **SIZES | dict(HKV=2))
    qkv = torch.cat((x.q, x.k, x.v), -1).float()
    q, k, v = qkv.split((16, 16, 20), -1)
    o, state = compose(check_call("hla3", q, k, v, output_final_state=True), run=Run())
    o_true, state_true = x.chunk(backend="torch", output_final_state=True)
    assert_close(o, o_true, TOLERANCE, "o")
    assert_states_close(state, state_true, TOLERANCE)


@pytest.mark.parametrize("T", [0, 1])
def test_short_sequences(T):
    x = Inputs("hla2", "g", **SIZES | dict(T=T))
    o, state = call(x, output_final_state=True)
    o_true, state_true = x.chunk(backend="torch", output_final_state=True)
    assert_close(o, o_true, TOLERANCE, "o")
    for y, y_true in zip(state[:2], state_true[:2], strict=True):
        assert torch.allclose(y, y_true.float(), atol=1e-5)


def test_other_chains_are_left_alone():
    """More readings, a denominator, one stage: no match. Orders 2 and 3 of hla_n are hla2 and hla3."""
    plans = []

    def spy(stages, tensors, per_token, g, *, outputs, initial_states, cu_seqlens=None, output_final_states=True):
        plans.append(
            Plan(
                tuple(stages), tuple(tensors), tuple(per_token), (), tuple((n, "float32") for n in outputs),
                output_final_states,
            )
        )  # fmt: skip
        return [tensors["v"]] * len(outputs), [tensors["v"]] * len(stages)

    q = torch.randn(1, 2, 1, 4)
    cases = [
        ("linear_attn", {}, False), ("hla2", dict(normalize=True), False), ("hla_n", dict(order=4), False),
        ("hla_n", dict(order=2), True), ("hla_n", dict(order=3), True), ("ahla", dict(order=3), False),
        ("ahla", {}, True), ("hla2", dict(p="k", ridge=0.1), True), ("hla3", dict(value_ridge=0.1), True),
    ]  # fmt: skip
    for op, kw, expected in cases:
        compose(check_call(op, q, q, q, **kw), run=spy)
        assert (fused.matches(plans[-1]) is not None) == expected, (op, kw)

    plan = plans[-1]
    keys, values, outer = plan.stages
    assert fused.matches(replace(plan, outputs=(("k~", "float32"), *plan.outputs))) is None
    for stages in (
        (keys, values, replace(outer, query="k~")),
        (keys, values, replace(values, out="unread"), outer),
        (keys, values, replace(outer, mode="strict")),
        (keys, values, replace(outer, residuals=((0.1, "v"),))),
        (replace(keys, gate=1), values, outer),
        (keys, replace(values, query="k"), outer),
        (keys, replace(values, residuals=((0.1, "q"),)), outer),
    ):
        assert fused.matches(replace(plan, stages=stages)) is None


def test_large_heads_and_split_sequences_are_left_to_the_stages():
    run = Run()
    with pytest.raises(AssertionError):
        call(Inputs("hla2", B=1, T=4, HQ=1, HKV=1, K=65, V=4), run=run)
    call(Inputs("hla2", B=1, T=4, HQ=1, HKV=1, K=64, V=4), run=run)
    stages = Plan(tuple(run.stages), ("q", "k", "v"), (), (), ((run.stages[-1].out, "float32"),), False)
    split = cut(1, 4096, 1, None, torch.device("cpu"))
    assert split.split and not fused.fits(fused.matches(stages), run.x, None, split)
