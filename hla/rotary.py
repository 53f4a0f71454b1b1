"""Rotary position embeddings, computed when needed: no buffer that loading or a dtype could damage."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cos_sin(position_ids: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin ``[B, T, 1, dim / 2]`` of rotary embeddings at ``position_ids [B, T]``, in at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=dtype, device=position_ids.device) / dim)
    angle = position_ids[..., None, None].to(dtype) * frequency
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x [B, T, H, dim]``: feature i is paired with feature i + dim / 2."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
