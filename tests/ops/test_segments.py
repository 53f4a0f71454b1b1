"""Segment summaries: combine is associative with the empty segment as identity, and folding equals the recurrence."""

from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hla.ops.segments import advance, combine, empty, summarize
from hla.ops.state import zeros
from tests.ops.cases import CASES, F64, Inputs, assert_close, assert_states_close

OPS = ("linear_attn", "hla2", "ahla", "ahla1", "ahla3", "hla3", "hla_q4")
SEGMENT_CASES = [(n, o) for n, o in CASES if n in OPS and "normalize" not in o]
segment_case = pytest.mark.parametrize("name,option", SEGMENT_CASES)


def _read(keywords: dict) -> dict:
    """What a summary reads; nodes only shape how a state is read."""
    return {name: y for name, y in keywords.items() if name != "nodes"}


def summary(x: Inputs, start: int, end: int):
    part = x.tokens(start, end)
    return summarize(part.op, part.q, part.k, part.v, **_read(part.kw))


def tree_fold(parts: list):
    """The balanced bracketing, as different from a left fold as it gets."""
    if len(parts) == 1:
        return parts[0]
    return combine(tree_fold(parts[: len(parts) // 2]), tree_fold(parts[len(parts) // 2 :]))


@segment_case
def test_combine_is_associative(name, option):
    x = Inputs(name, option, T=30)
    a, b, c = summary(x, 0, 11), summary(x, 11, 13), summary(x, 13, 30)
    assert_states_close(combine(combine(a, b), c), combine(a, combine(b, c)))


@segment_case
def test_empty_segment_is_the_identity(name, option):
    x = Inputs(name, option, T=9)
    a = summary(x, 0, 9)
    nothing = summary(x, 4, 4)
    assert_states_close(nothing, empty(a), 0.0)
    assert_states_close(combine(a, nothing), a)
    assert_states_close(combine(nothing, a), a)


@segment_case
@pytest.mark.parametrize("borders", [[0, 30], list(range(31)), [0, 1, 1, 17, 30], [0, 13, 28, 29, 30]])
@pytest.mark.parametrize("fold", [lambda parts: reduce(combine, parts), tree_fold])
def test_folding_in_any_bracketing_equals_the_recurrence(name, option, borders, fold):
    x = Inputs(name, option, T=30)
    _, truth = x.recurrent(output_final_state=True)
    segment = fold([summary(x, a, b) for a, b in zip(borders, borders[1:], strict=False)])
    start = zeros(x.op, 2, 4, 2, 3, 5, order=x.order, p_heads=_p_heads(x), dtype=F64)
    assert_states_close(advance(start, segment), truth)


@segment_case
def test_advancing_a_state_equals_continuing_from_it(name, option):
    x = Inputs(name, option, T=30)
    _, state = x.tokens(0, 12).recurrent(output_final_state=True)
    _, truth = x.recurrent(output_final_state=True)
    assert_states_close(advance(state, summary(x, 12, 30)), truth)


@given(name=st.sampled_from(OPS), cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 10**6))
def test_any_cuts(name, cuts, seed):
    x = Inputs(name, "g", B=1, T=40, HQ=2, HKV=1, seed=seed)
    borders = [0, *sorted(cuts), 40]
    segment = tree_fold([summary(x, a, b) for a, b in zip(borders, borders[1:], strict=False)])
    for part, truth in zip(segment, summary(x, 0, 40), strict=True):
        assert_close(part, truth, 1e-10)


@segment_case
def test_summaries_round_nothing(name, option):
    """A summary of bfloat16 tokens is that of the same numbers in float32: k~, v~ and the moments are never rounded."""
    x = Inputs(name, option, T=70)
    low = {n: y.to(torch.float32 if n == "g" else torch.bfloat16) for n, y in x.tensors().items()}
    results = []
    for cast in (lambda y: y, Tensor.float, Tensor.double):
        q, k, v, kw = x.with_tensors({n: cast(y) for n, y in low.items()})
        results.append(summarize(x.op, q, k, v, **_read(kw)))
    for a, b, c in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32 and c.dtype == F64
        assert_close(a, b, 1e-6)
        assert_close(a.double(), c, 1e-4)


def test_gradients_flow_through_summaries():
    x = Inputs("hla3", "g", B=1, T=6, HQ=2, HKV=1, K=2, V=2)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v, x.kw["g"])]

    def function(q, k, v, g):
        cut = lambda y, a, b: y[:, a:b]  # noqa: E731
        one, two = (summarize("hla3", *(cut(y, *ab) for y in (q, k, v)), g=cut(g, *ab)) for ab in ((0, 4), (4, 6)))
        return combine(one, two).F

    assert torch.autograd.gradcheck(function, leaves)


def test_only_segments_of_one_operator_combine():
    x, y = Inputs("hla2", T=4), Inputs("ahla", T=4)
    with pytest.raises(TypeError, match="HLA2Segment and AHLASegment"):
        combine(summary(x, 0, 4), summary(y, 0, 4))
    with pytest.raises(TypeError, match="can't advance"):
        advance(zeros("ahla", 2, 4, 2, 3, 5, order=2), summary(x, 0, 4))
    with pytest.raises(ValueError, match="hla_n"):
        summarize("hla_n", x.q, x.k, x.v)


def _p_heads(x: Inputs) -> int:
    p = x.kw.get("p", "q")
    return 2 if isinstance(p, str) and p == "k" else 4 if isinstance(p, str) else p.shape[2]
