"""Cross-entropy of next tokens that never holds the logits of a whole batch of a large vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hla.ops.checks import HAS_TRITON

LOGITS_BYTES = 256 << 20  # of logits at a time; below this nothing is saved by cutting
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that the kernel takes


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

    Where the logits would take more than 256 MiB they are made piece by piece: the memory is that of one piece. On a
    CPU, and for a head that is more than a matrix, they are made again in the backward pass, at the price of one more
    product with the head. On a GPU a kernel replaces the logits by their gradient, and the forward pass goes on to
    those of ``hidden`` and of the weight, which are kept for the backward pass (the latter in float32).

    Args:
        hidden: ``[N, hidden_size]``, the model's output before the head.
        head: from ``[N, hidden_size]`` to logits ``[N, vocab_size]``, in the dtype of autocast where it is on.
        targets: int64 ``[N]``; -100 counts not.

    Raises:
        RuntimeError: on a GPU, for a gradient of the gradient.
    """
    if _fuses(hidden, head, targets):
        if torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad):
            return _Fused.apply(hidden, head.weight, targets)
        return _fused(hidden, head.weight, targets, False, False)[0]
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


def _fuses(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> bool:
    """Whether the kernel computes it. It sees the weight alone: no adapter, hooks, or anything that moves weights."""
    if not _has_kernel(hidden) or torch.compiler.is_compiling():
        return False
    if type(head) is not torch.nn.Linear or head.bias is not None or "forward" in vars(head):
        return False
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return False
    if getattr(head, "_is_fsdp_managed_module", False):  # (FSDP of a whole model has no hooks here)
        return False
    weight = head.weight
    return (
        type(hidden) is Tensor and type(weight) is torch.nn.Parameter  # neither fake nor distributed
        and hidden.dtype in DTYPES and weight.dtype in DTYPES
        and (hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type))
        and hidden.dim() == 2 and targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
        and hidden.device == weight.device == targets.device
    )  # fmt: skip


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and HAS_TRITON


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss, dhidden, dweight = _fused(hidden, weight, targets, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        from hla.kernels.library import refuse_double_backward

        refuse_double_backward()
        return *map(_scaled, ctx.saved_tensors, (dloss, dloss), ctx.dtypes), None


def _fused(
    hidden: Tensor, weight: Tensor, targets: Tensor, hidden_needs: bool, weight_needs: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients where they are needed: that of hidden in its dtype, that of the weight in float32."""
    from hla.kernels.cross_entropy import cross_entropy_

    kind, (N, V) = hidden.device.type, (len(hidden), len(weight))
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    rows = max(1, LOGITS_BYTES // (V * dtype.itemsize))
    rows = rows // 128 * 128 or rows  # whole tiles of the products; and slices that are aligned compile nothing anew
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=hidden.device)  # noqa: E731
    losses, logits = new(N), new(min(N, rows), V, dtype=dtype)
    dhidden = new(*hidden.shape, dtype=hidden.dtype) if hidden_needs else None
    dweight = new(*weight.shape).zero_() if weight_needs else None
    targets = targets.contiguous()
    with torch.autocast(kind, enabled=False):  # what it would cast is cast here, the weight once
        weight = weight.to(dtype)
        for begin in range(0, N, rows):
            some = slice(begin, begin + rows)
            h = hidden[some].to(dtype)
            piece = torch.mm(h, weight.T, out=logits[: len(h)])
            cross_entropy_(piece, targets[some], losses[some], gradient=hidden_needs or weight_needs)
            if dhidden is not None:
                dhidden[some] = piece @ weight
            if dweight is not None:
                _add_product(dweight, piece.T, h)
    return losses.sum(), dhidden, dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in float32, where the device can without rounding the product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _scaled(x: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``x * factor`` in one pass. (A factor without dimensions would be rounded to the dtype of x first.)"""
    return None if x is None else torch.mul(x, factor.view(1), out=torch.empty_like(x, dtype=dtype))
