"""A training run whose ranks all have the whole model, and share out the rows of a batch, and with sp the sequences.

What travels is the sum of the gradients, once a step, and with sp what pieces of a sequence tell each other. The rest
is the run of one process: float32 weights, autocast, and on GPUs the forward and backward pass of a micro-batch as a
CUDA graph, what pieces tell each other included. (FSDP's gathers would not let capture.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hla.build import recompute_activations
from hla.data import Row, pack_rows
from hla.distributed.sequence import SequenceParallel
from hla.distributed.training import Spread
from hla.graphed import GraphedTraining
from hla.loss import mean_loss
from hla.train_config import TrainConfig
from hla.training_state import restore, run_tensors
from hla.update import clip_and_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALIGNED = 64  # numbers from one parameter's gradient to the next one's begin at a multiple of this


class Replicas(Spread):
    """The model, which goes to the device in place, on every rank; tp is 1. The methods are those of `Spread`."""

    def place(self, model: PreTrainedModel, devices: DeviceMesh, dtype: torch.dtype, config: TrainConfig) -> None:
        torch.nn.Module.to(model, self.device)  # in place; transformers hides the type of its own
        if config.recompute:
            recompute_activations(model)
        self.model, self.dtype, self.sequence = model, dtype, None  # type: ignore[assignment]
        if self.pieces > 1:
            self.sequence = SequenceParallel(devices["sp"])
            self.model.set_sequence_parallel(self.sequence)
        for p in model.parameters():  # the same to the bit, also where processors of two kinds have drawn them
            dist.broadcast(p.detach(), 0)
        self.gradients = _in_one_piece([p for p in model.parameters() if p.requires_grad])
        self.graphed = GraphedTraining(model, dtype, config.captures(self.device.type), self.pieces)

    def step(
        self, optimizer: torch.optim.Optimizer, batches: Sequence[Sequence[Row]], clip: float
    ) -> tuple[float, float]:
        tokens = sum(length for rows in batches for _, _, length in rows)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in batches:
            mine, weight = self.share(rows)
            if weight:  # (nobody waits before the sum for a rank with other rows)
                loss += self.graphed(*self.cut(pack_rows(mine)), tokens)
        self.graphed.settle()  # (if this rank had no rows in the whole step)
        dist.all_reduce(self.gradients)
        # A sum is the same to the bit on all ranks, and so are the norm and the weights after the step.
        dist.all_reduce(loss)
        norm = clip_and_step(optimizer, clip, loss)
        self.graphed.zero_grad()
        return loss.item(), norm.item()

    def nats(self, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return mean_loss(self.model, inputs, targets, 1, self.dtype)

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        return run_tensors(self.model, optimizer)

    def restore(self, path: Path, optimizer: torch.optim.Optimizer) -> None:
        restore(path, self.model, optimizer)

    def leave(self) -> None:
        self.graphed.release()

    def whole(self) -> PreTrainedModel | None:
        return self.model if self.world.rank == 0 else None


def _in_one_piece(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Zeros, of which the gradient of each parameter is a part from now on, so that one sum is that of all."""
    sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters]
    whole = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    for p, part in zip(parameters, whole.split(sizes), strict=True):
        p.grad = part[: p.numel()].view_as(p)
    return whole
