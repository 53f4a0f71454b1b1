"""Checkpoints of a model on a mesh, of a form that does not depend on the mesh.

In a checkpoint every tensor is whole, as one process has it: heads that ranks of one tp have are put together again.
So that no rank holds or writes more than its share, the rows of each tensor are dealt out evenly over all ranks,
whatever the mesh; to PyTorch's distributed checkpointing (DCP) they are ordinary DTensors, which it cuts anew for any
other number of ranks. One tensor at a time is whole on the devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hla.distributed.parallelize import placement_of, reshard, whole_tensor
from hla.distributed.tensor_parallel import Cut
from hla.models import HLAPreTrainedModel


class Resharding:
    """Between the tensors of a parallel model and its optimizer and those of a checkpoint, by their names there.

    Names are ``model.PARAMETER`` and ``optimizer.PARAMETER.KIND`` (:mod:`hla.training_state`). All ranks call the
    same methods with the same names.
    """

    def __init__(self, model: HLAPreTrainedModel) -> None:
        self.model, self.placement = model, placement_of(model)
        self.rows: DeviceMesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def ready(self) -> None:
        """To be called before the parameters of the model are looked at: an evaluation leaves some of them whole."""
        reshard(self.model)

    def shape(self, name: str, x: Tensor) -> tuple[int, ...]:
        """The shape in the checkpoint of what is ``x`` in this model."""
        shape, cut = list(x.shape), self._cut(name)
        if cut is not None and x.dim():
            shape[cut.dim] = sum(cut.sections)
        return tuple(shape)

    def dealt(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank writes into a checkpoint: copies, on the CPU, of its share of the rows."""
        result = {}
        for name, x in tensors.items():
            if isinstance(x, DTensor):
                whole = whole_tensor(x, self._cut(name), self.placement)
                x = self._deal(whole.cpu())
            result[name] = x
        return result

    def empty(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint is read into, to be given to `put`; tensors that are not spread are read as they are."""
        return {
            name: self._deal(torch.zeros(self.shape(name, x), dtype=x.dtype)) if isinstance(x, DTensor) else x
            for name, x in tensors.items()
        }

    @torch.no_grad()
    def put(self, read: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put what was read into the tensors of the model and its optimizer."""
        heads = self.placement.heads
        for name, x in tensors.items():
            if not isinstance(x, DTensor):
                continue
            whole = read[name]
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            cut = self._cut(name)
            if cut is not None and heads is not None:
                whole = cut.take(whole, heads.rank(), heads.size())
            here = [Replicate()] * x.device_mesh.ndim
            spread = DTensor.from_local(whole.to(x.device), x.device_mesh, here, run_check=False)
            x.to_local().copy_(spread.redistribute(placements=x.placements).to_local())

    def _cut(self, name: str) -> Cut | None:
        kind, _, rest = name.partition(".")
        return self.placement.cuts.get(rest.rpartition(".")[0] if kind == "optimizer" else rest)

    def _deal(self, whole: Tensor) -> Tensor:
        """The rows of this rank as a DTensor; the whole tensor if there are not rows enough for every rank."""
        ranks, rows = self.rows.size(), whole.shape[0]
        if -(-rows // ranks) * (ranks - 1) >= rows:
            return whole
        mine = whole.chunk(ranks)[self.rows.get_local_rank()].clone()
        return DTensor.from_local(
            mine, self.rows, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
