"""A training run on a mesh: which part of a batch is whose, the step, scores and telemetry of all ranks together.

The batches are those of one process, whatever the mesh: the rows of a micro-batch are shared out over dp, and the
sequence of each share over sp. Sums over the parts are those of the whole, up to the rounding of float32.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method

from hla.data import Batch, Row, TokenStream, pack_rows
from hla.distributed.batch import IGNORED, shard_sequence
from hla.distributed.checkpoint import Resharding
from hla.distributed.parallelize import clip_grad_norm, full_state_dict, parallelize_hla
from hla.distributed.world import World
from hla.errors import HLAError
from hla.evaluate import Evaluation, _groups, windows
from hla.loss import summed_cross_entropy
from hla.models import HLAForCausalLM
from hla.telemetry import largest_values
from hla.train_config import TrainConfig
from hla.training_state import restore, run_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Spread:
    """A model on the mesh of a run, and this rank's part in everything that is done with it.

    All methods are for all ranks together: what they return is the same on every rank, unless they say otherwise.

    Args:
        model: on the CPU, the same on every rank; it is spread in place.
        mesh: sizes of dp, sp and tp.

    Raises:
        HLAError: the model cannot be spread like that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: tuple[int, int, int],
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        config: TrainConfig,
    ) -> None:
        self.world, self.device = world, device
        self.replicas, self.pieces, self.heads = mesh
        devices = init_device_mesh(device.type, mesh, mesh_dim_names=("dp", "sp", "tp"))
        self.replica = devices["dp"].get_local_rank()
        try:
            self.place(model, devices, dtype, config)
        except (ValueError, TypeError) as error:
            raise HLAError(f"the model cannot be spread: {error}") from error

    def place(self, model: PreTrainedModel, devices: DeviceMesh, dtype: torch.dtype, config: TrainConfig) -> None:
        """Spreads the model; sets ``model``, ``sequence`` and ``dtype``, that of autocast."""
        self.dtype = torch.float32  # none: the model has its dtypes
        half = dtype == torch.bfloat16
        self.model = parallelize_hla(
            model,  # type: ignore[arg-type]
            devices,
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            activation_checkpointing=config.recompute,
            compile=config.compile,
        )
        self.sequence = self.model.sequence_parallel
        self.resharding = Resharding(self.model)
        # The root has embedding and head, which FSDP makes whole around calls of the model: this must be one.
        setattr(self.model, "summed_loss", types.MethodType(_summed_loss, self.model))  # noqa: B010
        register_fsdp_forward_method(self.model, "summed_loss")

    # ------------------------------------------------------------------------------------------------ parts

    def share(self, rows: Sequence[Row]) -> tuple[Sequence[Row], float]:
        """This rank's rows of a micro-batch, and what their loss counts.

        The last batch of an epoch may have fewer rows than there are replicas. One without rows must compute all the
        same, for the others wait for it: it takes a row of another's, which counts nothing.
        """
        begin, end = (len(rows) * r // self.replicas for r in (self.replica, self.replica + 1))
        return (rows[begin:end], 1.0) if end > begin else (rows[:1], 0.0)

    def cut(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is called with on this rank, and the targets ``[tokens]``, -100 where nothing counts."""
        inputs, targets = batch.inputs(self.device), batch.targets.to(self.device)
        if self.sequence is None:
            return inputs, targets[0]
        if inputs["input_ids"].shape[1] % self.pieces:  # rows that cannot be cut evenly; all of them together may be
            inputs = {"input_ids": batch.input_ids.to(self.device), "cu_seq_lens_q": batch.cu_seqlens.to(self.device)}
        whole = {**inputs, "shift_labels": targets.view_as(inputs["input_ids"])}
        piece = shard_sequence(whole, self.sequence)
        return piece, piece.pop("shift_labels").flatten()

    def total(self, numbers: Tensor) -> list[float]:
        """Sums over everything that is in different parts; ranks of one tp have the same parts."""
        numbers = numbers.double()
        dist.all_reduce(numbers)
        return (numbers / self.heads).tolist()

    # ------------------------------------------------------------------------------------------------ work

    def step(
        self, optimizer: torch.optim.Optimizer, batches: Sequence[Sequence[Row]], clip: float
    ) -> tuple[float, float]:
        """One optimizer step, as `hla.train.train_step`, on micro-batches of which every rank has all rows.

        Returns:
            (loss in nats per token, gradient norm before clipping). If either is not finite, the weights of all ranks
            stay as they were.
        """
        tokens = sum(length for rows in batches for _, _, length in rows)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in batches:
            mine, weight = self.share(rows)
            part = self.nats(*self.cut(pack_rows(mine))) * (weight / tokens)
            (part * self.replicas).backward()  # for FSDP divides the sum of the gradients by that
            loss += part.detach()
        norm = clip_grad_norm(self.model, clip)
        # The norm, too: all ranks must do the same with it, even where it differs in the last bit.
        found, norms = self.total(torch.stack([loss, norm.to(self.device)]))
        norm_of_all = norms * self.heads / self.world.size
        if math.isfinite(found) and math.isfinite(norm_of_all):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found, norm_of_all

    def nats(self, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Summed over this rank's tokens."""
        call: Any = self.model
        return call.summed_loss(inputs, targets)

    @torch.no_grad()
    def evaluate(
        self,
        stream: TokenStream,
        sizes: Sequence[int],
        *,
        context: int,
        rows: int,
        max_windows: int | None,
        stop: Callable[[], Any],
    ) -> Evaluation:
        """As `hla.evaluate.evaluate`, of this model, batches of windows shared out over dp.

        Args:
            stop: asked between batches, the same on every rank.

        Raises:
            HLAError: the model's output is not finite.
            KeyboardInterrupt: ``stop`` has returned something.
        """
        pieces = windows(stream, context, context - context // 4)
        if max_windows is not None and len(pieces) > max_windows:
            pieces = [pieces[i * len(pieces) // max_windows] for i in range(max_windows)]
        pieces.sort(key=lambda piece: piece[1])
        groups = list(_groups(pieces, rows * context // self.replicas))
        table = np.asarray(sizes, np.int64)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # nats, tokens, bytes
        self.model.eval()
        try:
            for begin in range(0, len(groups), self.replicas):
                if stop():
                    raise KeyboardInterrupt
                counts = begin + self.replica < len(groups)
                group = groups[begin + self.replica if counts else begin]
                batch = stream.pack([(start, length) for start, length, _ in group])
                kept = torch.cat([torch.arange(length) >= skip for _, length, skip in group])
                inputs, targets = self.cut(batch._replace(targets=batch.targets.masked_fill(~kept, IGNORED)))
                nats = self.nats(inputs, targets)
                if counts:
                    mine = targets[targets != IGNORED].cpu()
                    sums += torch.tensor([nats.item(), len(mine), table[mine.numpy()].sum()]).to(sums)
        finally:
            self.model.train()
        nats_of_all, tokens, size = self.total(sums)
        if not math.isfinite(nats_of_all):
            sentence = "the model's predictions are not finite numbers: its weights are broken"
            raise self.world.common(HLAError(sentence))
        return Evaluation(nats_of_all, round(tokens), round(size))

    def measure(self, rows: Sequence[Row]) -> dict[str, float]:
        """As `hla.telemetry.measure`, over all parts of a micro-batch."""
        inputs, _ = self.cut(pack_rows(self.share(rows)[0]))
        found = largest_values(self.model, inputs, self.dtype)
        values = torch.stack(list(found.values())).nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return dict(zip(found, values.tolist(), strict=True))

    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What this rank writes into a checkpoint."""
        self.resharding.ready()
        return self.resharding.dealt(run_tensors(self.model, optimizer))

    def restore(self, path: Path, optimizer: torch.optim.Optimizer) -> None:
        """See `hla.training_state.restore`."""
        restore(path, self.model, optimizer, self.resharding)

    def leave(self) -> None:
        """Before the process group ends, and of this rank alone: gives back what would keep it."""

    def whole(self) -> PreTrainedModel | None:
        """The model as one process has it, on the CPU, on the first rank; None on the others."""
        state = full_state_dict(self.model)
        if self.world.rank != 0:
            return None
        with torch.device("meta"):  # which draws no random numbers
            model = HLAForCausalLM(self.model.config)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model


def _summed_loss(model: Any, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return summed_cross_entropy(hidden.flatten(0, 1), model.lm_head, targets)
