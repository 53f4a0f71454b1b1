"""A model trained on meshes of data, sequence and tensor parallelism, and on one GPU (`benchmarks.scale.gpus`)."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.cuda.guard import Budget, free
from benchmarks.scale import formulas
from benchmarks.scale.ranks import Ranks, Table, rounded
from benchmarks.scale.times import Links, Rates, step
from hla.distributed import clip_grad_norm, parallelize_hla, shard_sequence
from hla.models import HLAForCausalLM

Row = dict[str, Any]
Mesh = tuple[int, int, int]  # dp, sp, tp
BATCHES = 4  # again and again, so that there is something to learn
COLUMNS = (
    "dp", "sp", "tp", "size", "rows", "T", "loss_first", "loss_last", "loss_difference", "ms_per_step",
    "tokens_per_s_per_gpu", "efficiency", "peak_gib", "expected_ms", "expected_gib", "error",
)  # fmt: skip
KEY = COLUMNS[:6]  # what a row measures


def meshes_of(gpus: int) -> list[Mesh]:
    """Each kind of parallelism alone; sp with dp; all three."""
    found = [(gpus, 1, 1), (1, gpus, 1), (1, 1, gpus)]
    if gpus >= 4:
        found.append((2, gpus // 2, 1))
    if gpus >= 8:
        found.append((2, gpus // 4, 2))
    return list(dict.fromkeys(found))


def train(ranks: Ranks, mesh: Mesh | None, size: str, rows: int, length: int, steps: int) -> tuple[list[float], Row]:
    """Losses of all steps; ms_per_step and peak_gib. Without a mesh every rank trains the whole by itself."""
    if mesh is None:
        device_mesh = init_device_mesh(ranks.kind, (ranks.size, 1), mesh_dim_names=("copies", "dp"))["dp"]
    else:
        device_mesh = init_device_mesh(ranks.kind, mesh, mesh_dim_names=("dp", "sp", "tp"))
    config = formulas.config_of(size)
    torch.manual_seed(0)
    with torch.device(ranks.device):
        model = HLAForCausalLM(config).train()
    half = torch.bfloat16 if ranks.kind == "cuda" else None
    parallelize_hla(model, device_mesh, param_dtype=half, reduce_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))

    def piece(seed: int) -> dict[str, Tensor]:
        ids = torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
        dp = device_mesh["dp"]
        mine = ids.to(ranks.device).chunk(dp.size())[dp.get_local_rank()]
        batch = {"input_ids": mine, "labels": mine}
        return batch if model.sequence_parallel is None else shard_sequence(batch, model.sequence_parallel)

    batches = [piece(seed) for seed in range(BATCHES)]
    losses, start, warm = [], 0.0, min(5, steps - 1)
    if ranks.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(steps):
        if i == warm:
            ranks.meet()
            start = time.perf_counter()
        loss = model(**batches[i % BATCHES]).loss
        loss.backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    ranks.synchronize()
    (seconds,) = ranks.largest([time.perf_counter() - start])
    peak = None
    if ranks.kind == "cuda":
        (peak,) = ranks.largest([torch.cuda.max_memory_allocated() / 2**30])
    mean = torch.stack(losses).double()
    dist.all_reduce(mean)  # over the dp; ranks of one dp have the same
    return (mean / ranks.size).tolist(), {"ms_per_step": 1e3 * seconds / (steps - warm), "peak_gib": peak}


def expected(mesh: Mesh, size: str, rows: int, length: int, rates: Rates) -> Row:
    """What the formulas say; nothing where they have nothing to say."""
    dp, sp, tp = mesh
    if tp > 1 or size not in rates.prompts:
        return {"expected_ms": "", "expected_gib": ""}
    config = formulas.config_of(size)
    one = step("hla", size, config, rates, Links(), ranks=dp * sp, sp=sp, tokens=length, checkpointing=False)
    assert one is not None
    memory = formulas.memory(
        config, ranks=dp * sp, sp=sp, tokens=length, checkpointing=False, working_bytes=rates.working_bytes(config),
        rows=rows // dp,
    )  # fmt: skip
    whole_logits = 10 * config.vocab_size * rows * length / (dp * sp)
    return {
        "expected_ms": round(1e3 * one.total * rows / dp, 1),
        "expected_gib": round((memory.total - formulas.LOSS_BYTES + whole_logits) / 2**30, 1),
    }


def training(args: argparse.Namespace, ranks: Ranks, table: Table, rates: Rates, budget: Budget) -> None:
    rows = max(4, ranks.size)
    length = args.tokens // rows
    meshes = meshes_of(ranks.size)
    if args.meshes:
        meshes = [tuple(map(int, text.split("x"))) for text in args.meshes]  # type: ignore[misc]
    alone: list[float] = []
    alone_ms = 0.0
    for mesh in [None, *meshes]:
        dp, sp, tp = mesh or (1, 1, 1)
        row: Row = dict.fromkeys(COLUMNS, "")
        row |= {"dp": dp, "sp": sp, "tp": tp, "size": args.size, "rows": rows, "T": length}
        row |= expected((dp, sp, tp), args.size, rows, length, rates)
        if ranks.first(budget.left) <= 0:
            row["error"] = "left out: time budget spent"
        else:
            ranks.say(f"{args.size}, dp {dp}, sp {sp}, tp {tp} ...")
            found, row["error"] = ranks.attempt(train, ranks, mesh, args.size, rows, length, args.steps)
            if found is not None:
                losses, numbers = found
                ms, gpus = numbers["ms_per_step"], dp * sp * tp
                if mesh is None:
                    alone, alone_ms = losses, ms
                row |= {
                    "loss_first": round(losses[0], 5), "loss_last": round(losses[-1], 5), "ms_per_step": round(ms, 2),
                    "tokens_per_s_per_gpu": round(1e3 * rows * length / ms / gpus),
                    "peak_gib": rounded(numbers["peak_gib"], 2),
                }  # fmt: skip
                if alone and mesh is not None:
                    row["loss_difference"] = f"{max(abs(a - b) for a, b in zip(losses, alone, strict=True)):.1e}"
                    row["efficiency"] = round(alone_ms / (gpus * ms), 3)
        table.add(row)
        free()
