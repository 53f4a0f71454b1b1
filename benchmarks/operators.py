"""The operators that benchmarks compare, as functions of nothing on given inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import hla


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal softmax attention on ``[B, T, H, D]``; transposed views, no copies."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)  # type: ignore[misc,arg-type]


def operators(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    ridge: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """Name -> function, on the same inputs ``[B, T, H, D]``. The decay and the ridge of hla_q are per token.

    Args:
        g: ``[B, T, heads of k]``, ridge: ``[B, T, heads of q]``; without them, constants made here.
        cu_seqlens: borders of packed sequences.
    """
    per_token = torch.full(q.shape[:3], 0.02, dtype=torch.float32, device=q.device)

    def hla_q() -> Tensor:  # as in the layer
        decay, shift = -per_token if g is None else g, 1 + per_token if ridge is None else ridge
        return hla.hla_q(q, k, v, g=decay, ridge=shift, cu_seqlens=cu_seqlens)[0]

    return {
        "linear_attn": lambda: hla.linear_attn(q, k, v, cu_seqlens=cu_seqlens)[0],
        "hla2": lambda: hla.hla2(q, k, v, cu_seqlens=cu_seqlens)[0],
        "hla_q default form": hla_q,
        "ahla": lambda: hla.ahla(q, k, v, cu_seqlens=cu_seqlens)[0],
        "hla3": lambda: hla.hla3(q, k, v, cu_seqlens=cu_seqlens)[0],
    }
