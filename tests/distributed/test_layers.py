"""A layer on pieces of a sequence is the layer on the whole: outputs, states, gradients of inputs and parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from hla import HigherOrderLinearAttention
from hla.distributed import SequenceParallel
from hla.layer_state import LayerState, map_state, state_tensors
from tests.ops.cases import F64, assert_close, gradients
from tests.test_layers import HIDDEN, OPTIONS, make_layer

T = 22
shapes_in_kernels = HigherOrderLinearAttention._shapes_in_kernels
LENGTHS = {2: [9, 13], 4: [6, 1, 2, 13]}  # pieces shorter than the convolution looks back
BORDERS = {"inside pieces": [0, 4, 8, 20, 22], "on borders": [0, 6, 7, 9, 9, 22], "near borders": [0, 5, 10, 11, 22]}
CHOSEN = (
    "default", "hla_q token", "hla_q constants", "linear_attn", "hla2 grouped q", "hla2 own p", "hla2 normalized",
    "hla2 bare", "ahla own p", "hla3 learned",
)  # fmt: skip


def check(
    groups, rank, name, size, borders=None, with_state=False, masked=False, given_positions=False,
    kernels=False,
):  # fmt: skip
    if rank >= size:
        return
    layer = make_layer(**OPTIONS[name])
    layer.sequence_parallel = SequenceParallel(groups[size], LENGTHS[size])
    parts = copy.deepcopy(layer)  # (shares the process group)
    layer.sequence_parallel = None
    span = parts.sequence_parallel.span(LENGTHS[size][rank])
    generator = torch.Generator().manual_seed(3)
    r = lambda *s: torch.randn(*s, dtype=F64, generator=generator)  # noqa: E731
    B = 2 if borders is None else 1
    x, dy, more = r(B, T, HIDDEN), r(B, T, HIDDEN), {}
    mask = None
    if borders is not None:
        more["cu_seqlens"] = torch.tensor(borders)
    if masked:
        mask = torch.ones(B, T)
        mask[0, :8] = 0
        mask[1, 20:] = 0
    positions = torch.arange(5, 5 + T)[None] if given_positions else None
    state = None
    if with_state:
        rows = B if borders is None else len(borders) - 1
        _, state = layer(r(rows, 5, HIDDEN), output_state=True)
        state = map_state(torch.Tensor.detach, state)

    def outcome(module, piece):
        own = x[:, piece].clone().requires_grad_()
        start = None
        if state is not None:
            start = map_state(lambda y: y.clone().requires_grad_() if y.is_floating_point() else y, state)
        cut = lambda y: None if y is None else y[:, piece]  # noqa: E731
        y, end = module(
            own, attention_mask=cut(mask), position_ids=cut(positions), state=start, output_state=True, **more
        )
        leaves = [*module.parameters()]
        if start is not None:
            leaves += [y for y in state_tensors(start) if y.is_floating_point()]
        share = 1 if module is layer else size
        loss = (y * cut(dy)).sum() + sum(e.square().sum() for e in state_tensors(end) if e.is_floating_point()) / share
        return y, end, *gradients(loss, [own, *leaves])

    y, end, dx, *truth = outcome(layer, slice(None))
    tolerance = 1e-10
    if kernels:  # in the interpreter, in float32
        HigherOrderLinearAttention._shapes_in_kernels, tolerance = lambda *_: True, 1e-4
    try:
        y_piece, end_piece, dx_piece, *found = outcome(parts, span)
    finally:
        HigherOrderLinearAttention._shapes_in_kernels = shapes_in_kernels
    assert isinstance(end_piece, LayerState)
    assert_close(y_piece, y[:, span], tolerance, "output")
    assert_close(dx_piece, dx[:, span], tolerance, "gradient of the input")
    for a, b in zip(state_tensors(end_piece), state_tensors(end), strict=True):
        assert_close(a, b, tolerance, "state")
    names = [n for n, _ in layer.named_parameters()] + ["state"] * 9
    for n, a, b in zip(names, found, truth, strict=False):
        a = a.contiguous()
        dist.all_reduce(a, group=groups[size])
        assert_close(a, b, 10 * tolerance, f"gradient of {n}")


@pytest.mark.parametrize("name", CHOSEN)
def test_pieces_are_the_whole(run, name):
    run(check, name, 4)


@pytest.mark.parametrize("options", [(), (None, True), (None, True, True)], ids=["alone", "state", "pads"])
def test_with_the_kernels_around_the_operator(run, options):
    pytest.importorskip("triton")
    options = (*options, *(None, False, False, False)[len(options) :])
    run(check, "default", 4, *options, True)


def test_two_ranks(run):
    run(check, "default", 2)


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("name", ["default", "hla_q token"])
def test_packed_sequences(run, name, borders):
    run(check, name, 4, borders)
    run(check, name, 4, borders, True)


@pytest.mark.parametrize("name", ["default", "hla_q token", "hla3 learned"])
def test_going_on_from_a_state(run, name):
    run(check, name, 4, None, True)


@pytest.mark.parametrize("name", ["default", "hla_q token"])
def test_pads(run, name):
    run(check, name, 4, None, False, True)


def test_given_positions(run):
    run(check, "hla_q token", 4, None, False, False, True)
