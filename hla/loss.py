"""Cross-entropy of next tokens that never holds the logits of a whole batch of a large vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 256 << 20  # float32 logits at a time; below this nothing is saved by cutting


def mean_loss(
    model: Any, inputs: Mapping[str, Tensor], targets: Tensor, total: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What a micro-batch adds to the mean loss of a step, in nats per token.

    Args:
        model: an `HLAForCausalLM` in training mode.
        inputs: what it is called with, on its device.
        targets: int64 ``[N]``, the token that follows each of the N tokens.
        total: tokens of the whole step.
        dtype: bfloat16 means autocast.
    """
    half = dtype == torch.bfloat16
    # Without autocast's cache of casts: a CUDA graph cannot have it (hla/graphed.py), and eager mode must give the same
    # bits. It would spare casts only where pieces of the loss read the head, whose gradients now add in float32.
    with torch.autocast(targets.device.type, dtype=torch.bfloat16, enabled=half, cache_enabled=False):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return summed_cross_entropy(hidden.flatten(0, 1), model.lm_head, targets) / total


def summed_cross_entropy(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """Sum of ``-log softmax(head(hidden))[target]`` in float32.

    Where the logits would take more than 256 MiB they are made piece by piece, and again in the backward pass: the
    memory is that of one piece, the price one more product with the head.

    Args:
        hidden: ``[N, hidden_size]``, the model's output before the head.
        head: from ``[N, hidden_size]`` to logits ``[N, vocab_size]``.
        targets: int64 ``[N]``.
    """
    rows = max(1, LOGITS_BYTES // (4 * head.out_features))
    if len(targets) <= rows:
        return _piece(hidden, head, targets)
    pieces = [
        checkpoint(_piece, h, head, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(pieces).sum()


def _piece(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
