"""A language model on a mesh of devices: data, sequence and tensor parallelism, FSDP2, checkpointing, compilation.

`parallelize_hla` is to this model what the ``parallelize`` function of a model is in torchtitan: the one place that
says how it is spread. `clip_grad_norm` and `full_state_dict` know what it did. See docs/distributed.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hla.distributed.sequence import SequenceParallel
from hla.distributed.tensor_parallel import Cut, check_heads, spread_heads
from hla.models.modeling_hla import HLABlock, HLAModel, HLAPreTrainedModel

DIMS = ("dp", "sp", "tp")


@dataclass
class Placement:
    """What a model remembers of how it is spread (its attribute ``placement``).

    shards: the ranks over which FSDP shards each parameter. heads: those that have the other heads, None without tp.
    cuts: how the parameters are cut that are spread over heads, by their names in the model.
    """

    shards: dist.ProcessGroup
    heads: dist.ProcessGroup | None
    cuts: dict[str, Cut]


def parallelize_hla(
    model: HLAPreTrainedModel,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    activation_checkpointing: bool = False,
    compile: bool | str = False,
) -> HLAPreTrainedModel:
    """Spreads a model over a mesh, in place: tp over heads, sp over the sequence, FSDP2 over dp and sp.

    Every rank calls it with the same model, the same parameters in it. After it:

    - the batch of a rank is that of its ``dp``, and of that the tokens of its ``sp`` (`shard_sequence` with
      ``model.sequence_parallel``, which is None where sp is 1); ranks of one ``tp`` have the same;
    - the loss is the mean over the labels of the rank's ``dp``, the same on every rank of it;
    - the gradient, after ``loss.backward()`` without any factor, is that of the mean of the losses over ``dp``: summed
      over sp and averaged over dp. (Where the dp have different numbers of labels, ``num_items_in_batch=labels of all
      dp / number of dp``, a Python number, makes that the mean over all labels.)
    - parameters are DTensors over dp and sp. An optimizer must be made afterwards.

    Args:
        model: `HLAForCausalLM` or `HLAModel`; it may be on the CPU still, the pieces go to the mesh's devices.
        mesh: with dimensions named "dp", "sp", "tp", in this order; those not needed may be left out or be 1.
        param_dtype: of the matrices while they compute, gathered in it too; None means as they are. Norms and the
            numbers per head and channel of the blocks stay as they are, whatever this is.
        reduce_dtype: gradients are added up in it; None means as they come, in the dtype that computed.
        activation_checkpointing: keep only the input of each block, and compute the rest again in the backward pass.
        compile: compile each block with `torch.compile`; a string names the backend.

    Returns:
        The model. Embedding and output head (often one matrix) are not spread over tp, only by FSDP over dp and sp.

    Raises:
        TypeError: for a model, mesh, dtype or flag of another kind.
        ValueError: dimensions of other names or in another order, ``num_kv_heads`` or ``intermediate_size`` not
            divisible by tp, ``decay="fixed"`` with tp, softmax layers with sp, parameters of several dtypes, or a model
            that is parallel already.
    """
    _check(model, mesh, param_dtype, reduce_dtype, activation_checkpointing, compile)
    sizes = {dim: mesh[dim].size() if dim in _names(mesh) else 1 for dim in DIMS}
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, HLABlock)]
    check_heads([block for _, block in blocks], sizes["tp"])

    if sizes["sp"] > 1:
        model.set_sequence_parallel(SequenceParallel(mesh["sp"]))
    heads = mesh["tp"].get_group() if sizes["tp"] > 1 else None
    shards = _shard_mesh(mesh)
    cuts = {} if heads is None else spread_heads(blocks, heads)
    setattr(model, "placement", Placement(shards.get_group(), heads, cuts))  # noqa: B010 (a model declares no such name)

    whole = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for _, block in blocks:
        if param_dtype is not None:
            # A policy holds for a group, so matrices and the numbers that keep their precision are two groups.
            fully_shard(_matrices(block), mesh=shards, mp_policy=policy)
        fully_shard(block, mesh=shards, mp_policy=whole)
    fully_shard(model, mesh=shards, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP averages over its ranks; but those of one sp have parts of one gradient, which only add up.
            module.set_gradient_divide_factor(sizes["dp"])
            # (A factor of one's own needs a reduction that NCCL alone has, unless it is a sum and a division.)
            module.set_force_sum_reduction_for_comms(True)

    for _, block in blocks:
        # Not the block but its forward, so that FSDP's hooks around it are neither compiled nor run a second time; and
        # checkpointing outside, because where the graph breaks (sequence parallelism) torch.compile gives up on it.
        if compile:
            backend = compile if isinstance(compile, str) else "inductor"
            block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
        if activation_checkpointing:
            block.forward = _Checkpointed(block, block.forward)  # type: ignore[method-assign]
    if activation_checkpointing:
        for module in model.modules():
            if isinstance(module, HLAModel):
                module.gradient_checkpointing = True  # no caches while training: they would be advanced twice
    return model


class _Checkpointed:
    """The forward of a block which, while training, keeps only what it is given and runs again in the backward pass."""

    def __init__(self, block: HLABlock, forward: Callable[..., Any]):
        self.block, self.forward = block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.block.training:
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def _check(model, mesh, param_dtype, reduce_dtype, activation_checkpointing, compile) -> None:
    if not isinstance(model, HLAPreTrainedModel):
        raise TypeError(f"model must be an HLAForCausalLM or HLAModel, got {type(model).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    for name, dtype in (("param_dtype", param_dtype), ("reduce_dtype", reduce_dtype)):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"{name} must be a floating point dtype or None, got {dtype!r}")
    if not isinstance(activation_checkpointing, bool):
        raise TypeError(f"activation_checkpointing must be True or False, got {activation_checkpointing!r}")
    if not isinstance(compile, bool | str):
        raise TypeError(f"compile must be True, False or the name of a backend, got {compile!r}")
    names = _names(mesh)
    if not names or list(names) != [dim for dim in DIMS if dim in names]:
        raise ValueError(f'mesh must have dimensions among "dp", "sp", "tp", in this order; got {names}')
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    if len(dtypes) > 1:
        raise ValueError(f"model must have all parameters in one dtype, such as float32 with param_dtype; got {dtypes}")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("model is parallel already: parallelize_hla can be called once")


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


def _shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that have the same heads, in one dimension: over them FSDP shards parameters."""
    names = tuple(dim for dim in ("dp", "sp") if dim in _names(mesh))
    if not names:  # only tp: each rank by itself (FSDP still does the mixed precision)
        return DeviceMesh(mesh.device_type, mesh.mesh[:, None], mesh_dim_names=("tp", "dp"))["dp"]
    return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten("dp_sp")


def _matrices(block: HLABlock) -> list[nn.Module]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def placement_of(model: nn.Module) -> Placement:
    placement = getattr(model, "placement", None)
    if not isinstance(placement, Placement):
        raise ValueError("model must come from parallelize_hla")
    return placement


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has left whole: the parameters of the root."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def clip_grad_norm(model: HLAPreTrainedModel, max_norm: float) -> Tensor:
    """Scales all gradients so that their common norm is at most ``max_norm``; every rank must call it.

    As `torch.nn.utils.clip_grad_norm_`, which does not know that ranks of one tp hold pieces of some parameters and
    copies of others.

    Returns:
        The norm of the gradient of the whole model before that, a scalar, the same on every rank.

    Raises:
        ValueError: the model does not come from `parallelize_hla`, or max_norm is not positive.
    """
    placement = placement_of(model)
    if not max_norm > 0 or math.isnan(max_norm):
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    reshard(model)  # or the root has no gradients
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    local = [(name, g.to_local() if isinstance(g, DTensor) else g) for name, g in gradients]
    device = next(model.parameters()).device
    squares = torch.zeros(2, device=device)  # of pieces, and of copies
    for name, g in local:
        squares[0 if name in placement.cuts else 1] += g.float().square().sum()
    dist.all_reduce(squares, group=placement.shards)
    if placement.heads is not None:
        dist.all_reduce(squares[:1], group=placement.heads)
    norm = squares.sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, g in local:
        g.mul_(scale.to(g.dtype))
    return norm


def full_state_dict(model: HLAPreTrainedModel) -> dict[str, Tensor]:
    """The parameters of the whole model, as `HLAForCausalLM` in one process has them; every rank must call it.

    Returns:
        On rank 0, all parameters on the CPU, with the names of ``model.state_dict()``; an empty dict on the other
        ranks. One parameter at a time is whole on the devices.

    Raises:
        ValueError: the model does not come from `parallelize_hla`.
    """
    placement = placement_of(model)
    result = {}
    for name, whole in _gathered(model, placement):
        if dist.get_rank() == 0:
            result[name] = whole.cpu().clone()
    return result


@torch.no_grad()
def _gathered(model: nn.Module, placement: Placement) -> Iterator[tuple[str, Tensor]]:
    for name, x in model.state_dict().items():
        yield name, whole_tensor(x, placement.cuts.get(name), placement)


@torch.no_grad()
def whole_tensor(x: Tensor, cut: Cut | None, placement: Placement) -> Tensor:
    """A parameter, or what an optimizer has of its shape, from the pieces of all ranks, on every rank."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    if cut is not None and placement.heads is not None:
        pieces = [torch.empty_like(x) for _ in range(placement.heads.size())]
        dist.all_gather(pieces, x.contiguous(), group=placement.heads)
        x = cut.join(pieces)
    return x
