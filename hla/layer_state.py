"""What a layer keeps of the tokens it has seen, and what can be done with all tensors of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from hla.ops.state import State


class LayerState(NamedTuple):
    """What a layer keeps of the tokens it has seen; leading dimension B, or N with ``cu_seqlens``.

    conv: ``[B, channels, conv_size - 1]``, the last inputs of the short convolution; None without convolution.
    op: the operator's state, a NamedTuple such as ``HLA2State``.
    position: int64 ``[B]``, the position of the next token; None without RoPE.

    Floating point members are float32 (float64 if the layer runs in float64).
    """

    conv: Tensor | None
    op: State
    position: Tensor | None


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state (or part of one) with ``function`` applied to every tensor."""
    if isinstance(state, tuple):
        return type(state)(*(map_state(function, x) for x in state))  # type: ignore[arg-type]
    return None if state is None else function(state)


def copy_state(out: LayerState, new: LayerState) -> None:
    """Writes ``new`` into the tensors of ``out``, keeping their addresses."""
    for target, source in zip(state_tensors(out), state_tensors(new), strict=True):
        if target is not source:
            target.copy_(source.detach())


def state_tensors(state: LayerState) -> list[Tensor]:
    """The tensors of a state, in a fixed order."""
    return [x for x in (state.conv, *state.op, state.position) if x is not None]
