"""The Triton kernels, run by Triton's interpreter on the CPU, equal the float64 chunk form: outputs, states, gradients.

(tests/gpu runs the same kernels compiled, at sizes the interpreter would take hours for.)
"""

import pytest
import torch

import hla

pytest.importorskip("triton")
from hla.kernels import query_side, segments
from hla.ops.checks import check_call
from tests.ops.cases import CASES, F64, Inputs, assert_close, case, gradients

SHAPES = {  # several chunks, the last one not full; head sizes are not powers of two
    "grouped": dict(B=1, T=70, HQ=2, HKV=1, K=3, V=20),
    "split": dict(B=1, T=130, HQ=1, HKV=1, K=17, V=5),
    "whole": dict(B=1, T=60, HQ=2, HKV=1, K=3, V=5),
}


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 64)


def results(x: Inputs, dtype, backend, cu_seqlens=None, initial_state=None, final=True, fixed=()):
    """Output, final state and gradients of everything, the final state having one too.

    ``fixed``: fields of the initial state that need no gradient.
    """
    leaves = {
        n: y.to(dtype if n != "g" or dtype == F64 else torch.float32).requires_grad_() for n, y in x.tensors().items()
    }
    q, k, v, kw = x.with_tensors(leaves)
    states = []
    if initial_state is not None:
        given = initial_state._asdict().items()
        states = [y.detach().to(dtype).requires_grad_(n not in fixed) for n, y in given if y is not None]
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
    states = [y for y in states if y.requires_grad]
    return o, state, gradients(total, [*leaves.values(), *states]), [*leaves, *range(len(states))]


def flat(state):
    """All tensors of a state, tuples of tensors among its fields included."""
    for y in state or ():
        yield from (z for z in (y if isinstance(y, tuple) else (y,)) if z is not None)


@case
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_the_float64_chunk_form(name, option, shape, short_segments):
    check(Inputs(name, option, **SHAPES[shape]))


@pytest.mark.parametrize("name,option", [c for c in CASES if c[0].startswith("hla_q")])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_readings_of_hla_q_in_one_kernel_equal_the_chunk_form(name, option, shape, short_segments):
    x = Inputs(name, option, **SHAPES[shape])
    assert query_side.supports(check_call(x.op, x.q, x.k, x.v, **x.kw))
    check(x, fixed=("S",))


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
