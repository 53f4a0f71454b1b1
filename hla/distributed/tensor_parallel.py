"""Tensor parallelism over heads: every rank keeps some heads of each mixer and some columns of each MLP.

A mixer's heads do not see each other between its input and its output projection, so a rank that has a part of the
heads runs the ordinary layer with fewer of them; only the sum over ranks in the output projection must travel. The
parameters stay plain tensors, which FSDP2 can shard further. They are no DTensors over heads, because the projection
of q, k and v is one matrix ``[q | k | v | p]`` of which a rank keeps a piece of *each* part: no placement says that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_reduce, wait_tensor

from hla.layers import HigherOrderLinearAttention
from hla.models.modeling_hla import HLAAttention, HLABlock
from hla.norm import RMSNorm


@dataclass(frozen=True)
class Cut:
    """How a parameter is spread: it consists of sections along a dimension, and each rank has an equal part of each."""

    dim: int
    sections: tuple[int, ...]

    def take(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of one rank, in memory of its own."""
        parts = [section.chunk(size, self.dim)[rank] for section in whole.split(self.sections, self.dim)]
        return torch.cat(parts, self.dim)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse: the whole parameter from the pieces of all ranks."""
        sizes = [section // len(pieces) for section in self.sections]
        parts = zip(*(piece.split(sizes, self.dim) for piece in pieces), strict=True)
        return torch.cat([x for part in parts for x in part], self.dim)


class _Broadcast(torch.autograd.Function):
    """x for every rank's heads: the same forward, and backward the sum of what the ranks found."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor):
        return _total(dx, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over the ranks; whoever reads it has the same gradient for each summand."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _total(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor):
        return dx, None


def _total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # (The functional collective, because torch.compile can trace it.)
    return wait_tensor(all_reduce(x.contiguous(), "sum", group))


class SharedRMSNorm(RMSNorm):
    """The norm of each head's output: its weight serves the heads of all ranks, so its gradient is a sum over them."""

    def __init__(self, norm: RMSNorm, group: dist.ProcessGroup):
        super().__init__(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        self.weight = norm.weight
        self.group = group

    def shared_weight(self) -> Tensor:
        return _Broadcast.apply(self.weight, self.group)


def check_heads(blocks: Sequence[HLABlock], size: int) -> None:
    """Raises a ValueError unless every layer can be spread over ``size`` ranks."""
    for block in blocks:
        mixer, where = block.mixer, f"tensor parallelism over {size} ranks, but layer {block.layer_idx} has"
        if mixer.num_kv_heads % size:
            raise ValueError(f"num_kv_heads must be divisible for {where} {mixer.num_kv_heads}")
        if block.mlp.gate_proj.out_features % size:
            raise ValueError(f"intermediate_size must be divisible for {where} {block.mlp.gate_proj.out_features}")
        if size > 1 and getattr(mixer, "decay", None) == "fixed":
            raise ValueError(f'decay must be "none" or "token" for {where} "fixed", constants that count the heads')


@torch.no_grad()
def spread_heads(blocks: Sequence[tuple[str, HLABlock]], group: dist.ProcessGroup) -> dict[str, Cut]:
    """Leaves this rank's heads and MLP columns in each of the blocks, given with their names in the model.

    Returns:
        The cuts of all parameters that changed, by their names in the model. The others are the same on every rank.
    """
    cuts: dict[str, Cut] = {}
    for name, block in blocks:
        mixer, mlp = block.mixer, block.mlp
        rows: tuple[int, ...] = ()
        if isinstance(mixer, HLAAttention):
            rows = tuple(mixer.head_dim * n for n in (mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads))
        else:
            rows = tuple(mixer.split_sizes)
        for module, prefix in ((mixer, f"{name}.mixer"), (mlp, f"{name}.mlp")):
            for key, parameter in list(module.named_parameters()):
                if key == "o_norm.weight":
                    continue
                if key in ("o_proj.weight", "down_proj.weight"):
                    cut = Cut(1, (parameter.shape[1],))
                elif key.startswith(("qkv_proj.", "conv_weight")):
                    cut = Cut(0, rows)
                else:  # per head, or per column of the gates: in the order of the heads
                    cut = Cut(0, (parameter.shape[0],))
                _replace(module, key, cut.take(parameter, group.rank(), group.size()))
                cuts[f"{prefix}.{key}"] = cut
            module.register_forward_pre_hook(_Broadcaster(group))
        for projection in (mixer.o_proj, mlp.down_proj):
            projection.register_forward_hook(_Summer(group))
        mixer.num_heads //= group.size()
        mixer.num_kv_heads //= group.size()
        if isinstance(mixer, HigherOrderLinearAttention):
            mixer.split_sizes = [n // group.size() for n in mixer.split_sizes]
            mixer.channels = sum(mixer.split_sizes)
            if mixer.o_norm is not None:
                mixer.o_norm = SharedRMSNorm(mixer.o_norm, group)
    return cuts


class _Broadcaster:
    """Before a mixer or MLP (its first argument is what all its projections read)."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, module: nn.Module, args: tuple):
        return _Broadcast.apply(args[0], self.group), *args[1:]


class _Summer:
    """Behind the projection that ends a mixer or MLP."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _Sum.apply(output, self.group)


def _replace(module: nn.Module, key: str, value: Tensor) -> None:
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    old = owner.get_parameter(name)
    setattr(owner, name, nn.Parameter(value, requires_grad=old.requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
