"""What grows before a loss becomes NaN: the largest state and output of every layer, measured now and then.

Outputs of an HLA operator grow with the length to the power of its order, and states with what keys and gates let
through; a layer that is about to diverge shows it here many steps before the loss does.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hla.data import Batch
from hla.layers import HigherOrderLinearAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWN = 10.0  # times the median of the last readings: worth a warning
READINGS = 20


def measure(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> dict[str, float]:
    """Largest magnitudes in one forward pass over ``batch``, without gradient.

    Returns:
        By name, for layer i: ``layer{i}/state_S`` (every state of an HLA layer, after the last token),
        ``layer{i}/output`` (of the mixer), ``layer{i}/stream`` (the residual stream after it); and ``logits``.
    """
    found = largest_values(model, batch.inputs(model.device), dtype)
    values = torch.stack(list(found.values())).tolist()  # one wait for the device
    return dict(zip(found, values, strict=True))


@torch.no_grad()
def largest_values(model: PreTrainedModel, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The numbers of :func:`measure`, still on the device, for what a model is called with."""
    found: dict[str, Tensor] = {}
    handles = []

    def largest(x: Tensor) -> Tensor:
        return x.detach().abs().max().float() if x.numel() else torch.zeros((), device=x.device)

    for index, block in enumerate(model.model.layers):

        def mixed(mixer: Any, args: Any, options: dict[str, Any], output: Any, name: str = f"layer{index}") -> None:
            found[f"{name}/output"] = largest(output[0] if isinstance(output, tuple) else output)
            if isinstance(mixer, HigherOrderLinearAttention):
                _, state = mixer.forward(*args, **{**options, "output_state": True})  # forward itself: no hooks
                assert state is not None
                for part, value in zip(state.op._fields, state.op, strict=True):
                    if isinstance(value, Tensor):
                        found[f"{name}/state_{part}"] = largest(value)

        def left(block: Any, args: Any, output: Any, name: str = f"layer{index}") -> None:
            found[f"{name}/stream"] = largest(output)

        handles += [block.mixer.register_forward_hook(mixed, with_kwargs=True), block.register_forward_hook(left)]
    training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found["logits"] = largest(model(**inputs, use_cache=False).logits)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def layer_values(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of :func:`measure` in a record of metrics.jsonl, if it has any."""
    return {name: value for name, value in record.items() if name == "logits" or name.startswith("layer")}


class Watch:
    """Tells which numbers have grown out of what they lately were."""

    def __init__(self, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._seen: dict[str, deque[float]] = {}
        for record in earlier:
            self.grown(record)

    def grown(self, record: Mapping[str, Any]) -> list[str]:
        """Names of the numbers above ten times the median of their last twenty readings, or not finite."""
        names = []
        for name, value in record.items():
            seen = self._seen.setdefault(name, deque(maxlen=READINGS))
            if not math.isfinite(value) or (len(seen) >= 3 and value > GROWN * statistics.median(seen) > 0):
                names.append(name)
            if math.isfinite(value):
                seen.append(value)
        return names
