"""Train on a sequence whose activations would not fit: piece by piece, with the states between the pieces carried.

All that later tokens read of a piece is the state it leaves, which has a constant size. So one pass without gradients
notes the states between the pieces; then, from the last piece to the first, each is computed again and gone back
through with the gradient of the state it left, and hands the gradient of the state it began with to the piece before.
Nothing is truncated: the gradient is that of the whole sequence. Memory is that of one piece, whatever the length;
the price is one more forward pass, as with activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hla.layer_state import LayerState, map_state, state_tensors
from hla.layers import HigherOrderLinearAttention
from hla.loss import summed_cross_entropy

IGNORED = -100
States = dict[nn.Module, LayerState]


def backward_in_pieces(
    model: Any, input_ids: Tensor, targets: Tensor, *, piece: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Mean loss of whole sequences, whose gradient is added to that of the parameters as ``loss.backward()`` would.

    Args:
        model: an `HLAForCausalLM` without softmax layers, in one process.
        input_ids: int ``[B, T]``; every row is one sequence.
        targets: int ``[B, T]``, what is to follow each token (labels that are shifted already); -100 counts not.
        piece: tokens of a piece; as many as fit.
        dtype: bfloat16 means autocast.

    Returns:
        The loss in nats per token, a scalar without gradient.

    Raises:
        ValueError: softmax layers, a sequence-parallel model, layers checkpointed with ``use_reentrant=True``, a length
            of a piece below 1, or shapes that do not fit.
    """
    mixers = [m for m in model.modules() if isinstance(m, HigherOrderLinearAttention)]
    if "full_attention" in model.config.layer_types:
        raise ValueError("softmax layers read all earlier tokens: they leave no state that could be carried")
    if model.sequence_parallel is not None:
        raise ValueError("a sequence-parallel model cannot be run in pieces: call set_sequence_parallel(None) before")
    if piece < 1:
        raise ValueError(f"piece must be at least 1, got {piece}")
    if input_ids.dim() != 2 or input_ids.shape != targets.shape or not input_ids.numel():
        raise ValueError(
            f"input_ids and targets must have one shape [B, T]; got {list(input_ids.shape)}, {list(targets.shape)}"
        )
    pieces = list(zip(input_ids.split(piece, 1), targets.split(piece, 1), strict=True))
    count = (targets != IGNORED).sum().clamp(min=1)

    def hidden_states(ids: Tensor) -> Tensor:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state

    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    entering: list[States] = [{}]
    with torch.no_grad():
        for ids, _ in pieces[:-1]:
            with autocast, _carrying(mixers, entering[-1]) as left:
                hidden_states(ids)
            entering.append(_all_of(left, mixers))

    total = torch.zeros((), device=targets.device)
    after: list[Tensor | None] = []  # gradients of the state that the piece leaves; nothing reads that of the last
    for ids, wanted in reversed(pieces):
        states = {m: map_state(_leaf, state) for m, state in entering.pop().items()}
        # (Around the backward pass too: checkpointed layers run again in it.)
        with _carrying(mixers, states, differentiable=True) as left:
            with autocast:
                loss = summed_cross_entropy(hidden_states(ids).flatten(0, 1), model.lm_head, wanted.flatten()) / count
            outputs, gradients = [loss], [torch.ones_like(loss)]
            if after:
                ends = _tensors(_all_of(left, mixers), mixers)
                # (What frozen layers at the bottom of the model leave of the first piece has none.)
                pairs = [(x, dx) for x, dx in zip(ends, after, strict=True) if dx is not None and x.requires_grad]
                outputs, gradients = outputs + [x for x, _ in pairs], gradients + [dx for _, dx in pairs]
            torch.autograd.backward(outputs, gradients)
        after = [x.grad for x in _tensors(states, mixers)] if states else []
        total += loss.detach()
    return total


@contextmanager
def _carrying(
    mixers: list[HigherOrderLinearAttention], entering: States, differentiable: bool = False
) -> Iterator[States]:
    """Has every mixer begin with its state in ``entering`` (or at the start), and gives the states they leave."""
    left: States = {}

    def begin(mixer: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if differentiable and not torch.is_grad_enabled():
            raise ValueError("a layer is checkpointed with use_reentrant=True, which leaves its state without gradient")
        return args, {**options, "state": entering.get(mixer), "output_state": True, "out_state": None}

    def end(mixer: nn.Module, args: Any, output: tuple[Tensor, LayerState]) -> None:
        left.setdefault(mixer, output[1])  # the first time: a checkpointed layer runs twice

    handles = [m.register_forward_pre_hook(begin, with_kwargs=True) for m in mixers]
    handles += [m.register_forward_hook(end) for m in mixers]
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


def _all_of(left: States, mixers: list[HigherOrderLinearAttention]) -> States:
    assert len(left) == len(mixers), "a layer did not go through its mixer, so it has left no state"
    return left


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _tensors(states: States, mixers: list[HigherOrderLinearAttention]) -> list[Tensor]:
    """Those of the states that have gradients, in the order of the layers."""
    return [x for m in mixers for x in state_tensors(states[m]) if x.is_floating_point()]
