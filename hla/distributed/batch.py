"""Batches of a language model cut into pieces, and the mean loss of all pieces."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from hla.distributed.sequence import SequenceParallel

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels")
IGNORED = -100


def shard_sequence(batch: Mapping[str, Tensor], parallel: SequenceParallel, pad_token_id: int = 0) -> dict[str, Tensor]:
    """This rank's piece of a batch that every rank has whole, ready for a model with `set_sequence_parallel`.

    Args:
        batch: ``input_ids [B, T]`` or ``inputs_embeds [B, T, D]``; if they are there, ``attention_mask [B, T]``,
            ``position_ids [B or 1, T]``, ``labels`` or ``shift_labels [B, T]``, ``cu_seq_lens_q [N + 1]``.
        parallel: with its lengths, or without: then the batch is padded at its right end with ``pad_token_id``, which
            no token reads and no label counts, to a length that the number of ranks divides.

    Returns:
        The tokens of this rank. labels are shifted before they are cut, because the label of a piece's last token is on
        the next rank, and come as ``shift_labels``. position_ids that jump in a row (packed documents) become
        ``cu_seq_lens_q``, which stays that of the whole row.

    Raises:
        ValueError: for a name that is not listed above, shapes that do not fit, or packed rows with B > 1.
    """
    unknown = sorted(set(batch) - {*PER_TOKEN, "cu_seq_lens_q"})
    if unknown:
        raise ValueError(f"shard_sequence cuts {', '.join(PER_TOKEN)} and cu_seq_lens_q; got {', '.join(unknown)}")
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        raise ValueError("batch must have input_ids or inputs_embeds")
    rows, length = tokens.shape[:2]
    whole = dict(batch)
    borders = whole.pop("cu_seq_lens_q", None)
    for name, x in whole.items():
        if x.shape[1] != length or x.shape[0] not in ((1, rows) if name == "position_ids" else (rows,)):
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [{rows}, {length}] as the tokens have it")
    starts = None
    positions = whole.get("position_ids")
    if borders is not None:
        starts = torch.zeros(rows, length + 1, dtype=torch.bool, device=tokens.device)
        starts[:, borders.long()] = True
        starts = starts[:, :-1]
    elif positions is not None and "attention_mask" not in whole:
        starts = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)[:, :length]
        if bool(starts[:, 1:].any()):
            if rows > 1:
                raise ValueError(f"packed documents must be in one row, B = 1; got B = {rows}")
            borders = F.pad(starts[0].nonzero()[:, 0], (0, 1), value=length)
        starts = starts.expand(rows, length)
    if (labels := whole.pop("labels", None)) is not None and "shift_labels" not in whole:
        if starts is not None:
            labels = labels.masked_fill(starts, IGNORED)
        whole["shift_labels"] = F.pad(labels[:, 1:], (0, min(1, length)), value=IGNORED)

    if parallel.lengths is None:
        missing = -length % parallel.size
        fill = {"input_ids": pad_token_id, "shift_labels": IGNORED}
        for name, x in whole.items():
            if missing and name == "position_ids":
                more = torch.arange(1, missing + 1, device=x.device)
                whole[name] = torch.cat([x, x[:, -1:] + more], 1)
            elif missing:
                whole[name] = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill.get(name, 0))
        if missing and borders is not None:
            borders = torch.cat([borders, borders[-1:] + missing])
        start, size = parallel.rank * ((length + missing) // parallel.size), (length + missing) // parallel.size
    else:
        if sum(parallel.lengths) != length:
            raise ValueError(f"the batch has {length} tokens; lengths of the ranks add up to {sum(parallel.lengths)}")
        start, size = sum(parallel.lengths[: parallel.rank]), parallel.lengths[parallel.rank]
    piece = {name: x[:, start : start + size].contiguous() for name, x in whole.items()}
    if borders is not None:
        piece["cu_seq_lens_q"] = borders
    return piece


def labels_everywhere(
    shift_labels: Tensor | None, num_items_in_batch: int | Tensor | None, parallel: SequenceParallel
) -> int | Tensor:
    """What divides the summed loss: the number of labels on all ranks, unless another number is given."""
    if shift_labels is None:
        raise ValueError(
            "a sequence-parallel model needs shift_labels, for the label of a piece's last token is on the next rank "
            "(hla.distributed.shard_sequence shifts labels)"
        )
    if num_items_in_batch is not None:
        return num_items_in_batch
    return total((shift_labels != IGNORED).sum(), parallel)


def same_everywhere(loss: Tensor, parallel: SequenceParallel) -> Tensor:
    """A loss whose value is the sum of those of all ranks, and whose gradient is that of this rank's part.

    So gradients of parameters, summed over the ranks, are those of the whole loss.
    """
    return total(loss, parallel) + (loss - loss.detach())


def total(x: Tensor, parallel: SequenceParallel) -> Tensor:
    """The sum over all ranks, without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x, group=parallel.group)
    return x
