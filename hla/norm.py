"""The RMS norm of layers and models, alone and together with the residual stream that it reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hla.ops.checks import HAS_TRITON
from hla.projection import is_bare

WIDEST = 16384  # rows that one program of the kernel holds


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` in the dtype of its input, which keeps the fused kernels in use under autocast.

    Under autocast the result is rounded to its dtype once, not by every projection that reads it.
    """

    def shared_weight(self) -> Tensor:
        """The weight as it is used (tensor parallelism sums its gradient over ranks)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self._in_kernel(x):
            return self._residual_norm(x, None)[1]
        y = F.rms_norm(x, self.normalized_shape, self.shared_weight().to(x.dtype), self.eps)
        return y.to(_rounded(y.dtype, y.device))

    def residual(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``s = x + branch`` (x itself without) and the norm of s: on GPUs in one kernel, going back too.

        Whoever reads s instead of x afterwards lets the gradients of x meet in that kernel.
        """
        if self._in_kernel(x) and self.is_bare():
            return self._residual_norm(x, branch)
        s = x if branch is None else x + branch
        return s, self(s)

    def is_bare(self) -> bool:
        """See `hla.projection.is_bare`."""
        return is_bare(self)

    def _residual_norm(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        from hla.kernels.residual_norm import residual_norm

        assert self.eps is not None
        dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
        return residual_norm(x, branch, self.shared_weight(), self.eps, _rounded(dtype, x.device))

    def _in_kernel(self, x: Tensor) -> bool:
        """Whether the Triton kernel takes it. (Under torch.compile operations are fused anyway.)"""
        if not (x.is_cuda and HAS_TRITON) or x.dtype == torch.float64 or torch.compiler.is_compiling():
            return False
        plain = type(x) is Tensor and type(self.weight) is nn.Parameter  # not of a subclass that spreads or fakes it
        return plain and x.numel() > 0 and x.shape[-1] <= WIDEST and self.eps is not None


def residual(norm: nn.Module, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`RMSNorm.residual`, also of what may stand in the place of a norm (an adapter around it, say) and is called."""
    if isinstance(norm, RMSNorm):
        return norm.residual(x, branch)
    s = x if branch is None else x + branch
    return s, norm(s)


def _rounded(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a result of this dtype is rounded to."""
    if dtype != torch.float32 or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type)
