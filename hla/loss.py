"""Cross-entropy of next tokens that never holds the logits of a whole batch of a large vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 256 << 20  # float32 logits at a time; below this nothing is saved by cutting


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
