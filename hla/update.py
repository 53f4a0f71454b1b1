"""An optimizer step on clipped gradients, which changes nothing where loss or gradient is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clip_and_step(optimizer: torch.optim.Optimizer, clip: float, loss: Tensor) -> Tensor:
    """Scale the gradients so that their norm is at most ``clip``, and let the optimizer step if everything is finite.

    A fused Adam or AdamW scales while it reads the gradients, and decides on the device: the host does not wait, and
    can launch the step while the gradients are still being computed.

    Args:
        optimizer: its parameters count, those of all groups together.
        loss: any shape; a number that is not finite makes the step be left out, as does such a gradient.

    Returns:
        The gradient norm before clipping, a scalar on the device. The gradients themselves are undefined from here on.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = (loss.sum() + norm).isfinite()
    if isinstance(optimizer, torch.optim.Adam) and all(group.get("fused") for group in optimizer.param_groups):
        fused: Any = optimizer  # that reads what GradScaler leaves there; in float32, whatever the gradients have
        fused.grad_scale = ((norm.float() + 1e-6) / clip).clamp(min=1)
        fused.found_inf = (~finite).float()
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf
        return norm
    if finite:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        optimizer.step()
    return norm
