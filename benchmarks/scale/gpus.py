"""Sequence parallelism and `parallelize_hla` on several GPUs, beside one of them and what benchmarks.scale expects.

    torchrun --nproc-per-node 2 -m benchmarks.scale.gpus                # two GPUs, about two minutes
    torchrun --nproc-per-node 2 -m benchmarks.scale.gpus --device cpu --lengths 256 --size tiny --tokens 256 --steps 3

**Operators** (scale_gpus.csv): the default form of `hla_q`, and `hla2`; one sequence of T tokens, 16 heads of 128,
bfloat16 (float32 on a CPU), with the gradients of every tensor. First rank 0 has all of it alone, while the others
wait; then every rank has its piece.

    error_*         of the output and each gradient from those of one GPU alone, relative (norms over all ranks)
    alone_*         one GPU, the whole sequence: ms, and GiB in use
    piece_ms        one GPU, T / GPUs tokens, no other rank: forward + backward
    *_ms            all GPUs: median of the slowest rank, forward, and forward + backward
    waiting_ms      forward + backward, minus the same with every exchange replaced by a copy within the GPU
    efficiency      alone_both_ms / (gpus both_ms)
    peak_gib        in use on the rank that has the most, inputs included
    expected_*      formulas of `benchmarks.scale`: received_mib per rank, forward + backward; both_ms of hla_q, with
                    no work beside the operator behind which an exchange could hide

**Training** (scale_gpus_training.csv): a model on every mesh dp x sp x tp, the same global batches (4 of them, again
and again: random tokens), and on one GPU alone (every rank the same), bfloat16 with float32 weights by FSDP2.

    loss_first, _last   of the first and last step
    loss_difference     largest difference of a step's loss from one GPU's
    ms_per_step         mean, without the first five steps; efficiency against one GPU
    expected_*          formulas of `benchmarks.scale` (which know no tp)
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import hla
from benchmarks.cuda.guard import Budget, free, guarded
from benchmarks.measure import environment, gpu_software
from benchmarks.scale import formulas
from benchmarks.scale.gpus_plot import plot
from benchmarks.scale.gpus_training import KEY, training
from benchmarks.scale.ranks import Exchanges, Ranks, Table, in_turns, peak_gib, print_table, rounded
from benchmarks.scale.times import Links, Rates, fold_seconds, summary_seconds, told_back
from hla.distributed import SequenceParallel
from hla.models import SIZES, HLAConfig

HEADS, DIM = 16, 128
OPERATORS = ("hla_q", "hla2")
NAMES = {"hla_q": ("q", "k", "v", "g", "ridge"), "hla2": ("q", "k", "v")}
Row = dict[str, Any]


class Sequence:
    """Pieces of one sequence, the same whoever makes them: q, k, v, and of hla_q decay and ridge; and do."""

    def __init__(self, op: str, length: int, pieces: int, chosen: list[int], device: torch.device):
        made = [self._piece(length // pieces, index, device) for index in chosen]
        tensors = [torch.cat(x, 1) if len(x) > 1 else x[0] for x in zip(*made, strict=True)]
        self.op, self.do = op, tensors.pop()
        self.leaves = [x.requires_grad_() for x in tensors[: len(NAMES[op])]]

    @staticmethod
    def _piece(length: int, index: int, device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(index)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def new() -> Tensor:
            x = torch.randn(1, length, HEADS, DIM, generator=generator, device=device, dtype=dtype)
            return F.normalize(x, dim=-1)

        q, k, v, do = (new() for _ in range(4))
        share = torch.rand(1, length, HEADS, generator=generator, device=device)
        return [q, k, v, -0.05 * share, 0.5 + share, do]

    def output(self, parallel: SequenceParallel | None) -> Tensor:
        options = dict(zip(NAMES[self.op][3:], self.leaves[3:], strict=True))
        if parallel is None:
            return getattr(hla, self.op)(*self.leaves[:3], **options)[0]
        return parallel.run(self.op, *self.leaves[:3], **options)[0]

    def forward(self, parallel: SequenceParallel | None) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: self.output(parallel))

    def both(self, parallel: SequenceParallel | None) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            o = self.output(parallel)
            return [o.detach(), *torch.autograd.grad(o, self.leaves, self.do)]

        return run


def alone(ranks: Ranks, op: str, length: int, seconds: float) -> tuple[list[Tensor], list[float | None]]:
    """Rank 0 with the whole sequence: its output and gradients; ms forward, ms forward + backward, GiB."""
    sequence = Sequence(op, length, ranks.size, list(range(ranks.size)), ranks.device)
    functions: dict[str, Callable[[], object]] = {"forward": sequence.forward(None), "both": sequence.both(None)}
    times = [1e3 * statistics.median(x) for x in in_turns(functions, ranks, seconds).values()]
    peak = peak_gib(functions["both"], ranks.kind)
    return sequence.both(None)(), [*times, peak]


def differences(ranks: Ranks, mine: list[Tensor], whole: list[Tensor] | None) -> list[float]:
    """Relative difference of every tensor, of which each rank has a piece, from the whole ones that rank 0 has."""
    found = []
    for i, x in enumerate(mine):
        squares = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for rank in range(ranks.size):
            truth = torch.empty_like(x) if whole is None else whole[i].chunk(ranks.size, 1)[rank].contiguous()
            dist.broadcast(truth, 0)
            if rank == ranks.rank:
                truth = truth.float()
                squares[0] += (x.float() - truth).square().sum()
                squares[1] += truth.square().sum()
        dist.all_reduce(squares)
        found.append(float((squares[0] / squares[1]).sqrt()))
    return found


def operator(ranks: Ranks, op: str, length: int, seconds: float, row: Row) -> None:
    """Fills a row; what fails leaves it as far as it came, with an error."""
    whole, numbers, error = None, [None, None, None], ""
    if ranks.rank == 0:
        found, error = guarded(alone, ranks, op, length, seconds)
        whole, numbers = found or (whole, numbers)
    told: list[Any] = [numbers, error]
    dist.broadcast_object_list(told, 0)
    (forward, both, peak), error = told
    row |= {
        "alone_forward_ms": rounded(forward), "alone_both_ms": rounded(both), "alone_gib": rounded(peak, 2),
        "error": f"alone: {error}" if error else "",
    }  # fmt: skip
    free()

    parallel = SequenceParallel()
    sequence = Sequence(op, length, ranks.size, [ranks.rank], ranks.device)
    mine = sequence.both(parallel)()
    if both is not None:
        for name, x in zip(("o", *NAMES[op]), differences(ranks, mine, whole), strict=True):
            row[f"error_{name}"] = f"{x:.1e}"
    del mine, whole
    free()
    row["peak_gib"] = rounded(ranks.memory(sequence.both(parallel)), 2)
    with Exchanges().switched() as exchanges:

        def both_ways(real: bool) -> None:
            exchanges.real = real
            sequence.both(parallel)()

        times = ranks.time(
            {
                "forward_ms": sequence.forward(parallel),
                "both_ms": lambda: both_ways(True),
                "local": lambda: both_ways(False),
                "piece_ms": sequence.both(None),
            },
            seconds,
        )
    row |= {name: rounded(times[name]) for name in ("forward_ms", "both_ms", "piece_ms")}
    row["waiting_ms"] = rounded(times["both_ms"] - times["local"])
    row["efficiency"] = "" if both is None else rounded(both / (ranks.size * times["both_ms"]))


def expected(op: str, length: int, gpus: int, rates: Rates, links: Links) -> Row:
    config = HLAConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, op=op)
    told = (gpus - 1) * formulas.summary_bytes(config)
    received, seconds = 2 * told, None
    if op != "hla_q":
        decays, states = formulas.chain_numbers(op, HKV=HEADS, HP=HEADS, K=DIM, V=DIM)
        received = (gpus - 1) * formulas.F32 * (decays + 2 * states)
    else:
        local = length / gpus
        seconds = rates.mixer(op, config, round(local))[1]
        if gpus > 1:
            seconds += summary_seconds(config, rates, local, 0) + fold_seconds(config, rates, gpus, 0)
            seconds += links.gather(told, gpus) + told_back(config, rates, links, gpus, local)
    return {
        "expected_received_mib": round(received / 2**20, 2),
        "expected_both_ms": "" if seconds is None else round(1e3 * seconds, 2),
    }


COLUMNS = (
    "operator", "T", "alone_forward_ms", "alone_both_ms", "alone_gib", "piece_ms", "forward_ms", "both_ms",
    "waiting_ms", "efficiency", "peak_gib", "error_o", "error_q", "error_k", "error_v", "error_g", "error_ridge",
    "expected_received_mib", "expected_both_ms", "error",
)  # fmt: skip


def operators(args: argparse.Namespace, ranks: Ranks, table: Table, rates: Rates, budget: Budget) -> None:
    total = torch.cuda.get_device_properties(ranks.device).total_memory / 2**30 if ranks.kind == "cuda" else 0.0
    for op in args.operators:
        per_token = 0.0  # GiB
        for length in args.lengths:
            row: Row = dict.fromkeys(COLUMNS, "")
            row |= {"operator": op, "T": length, **expected(op, length, ranks.size, rates, Links())}
            if ranks.first(budget.left) <= 0:
                row["error"] = "left out: time budget spent"
            elif per_token * length > 0.95 * total:  # (ranks that run out of memory leave others waiting)
                row["error"] = f"left out: it would take about {per_token * length:.0f} GiB"
            else:
                ranks.say(f"{op}, {length} tokens ...")
                _, error = ranks.attempt(operator, ranks, op, length, args.seconds, row)
                row["error"] = "; ".join(x for x in (row["error"], error) if x)
                per_token = float(row["peak_gib"] or 0) / length
            table.add(row)
            free()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m benchmarks.scale.gpus", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=("operators", "training"), default=["operators", "training"])
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 17, 1 << 19, 1 << 21])
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring per number")
    parser.add_argument("--size", choices=list(SIZES), default="medium", help="of the model that is trained")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step, in four rows (or one per GPU, if more)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--meshes", nargs="+", metavar="DPxSPxTP", help="default: each alone, and some of two and three"
    )
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which nothing new starts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale_gpus.csv"))
    parser.add_argument("--report", action="store_true", help="measure nothing (without torchrun): tables, plot of OUT")
    args = parser.parse_args()
    args.lengths.sort()
    training_out = args.out.with_stem(f"{args.out.stem}_training")
    if args.report:
        if not any(path.is_file() for path in (args.out, training_out)):
            parser.error(f"there are no rows in {args.out} yet: measure first, without --report")
        for path in (args.out, training_out):
            if path.is_file():
                print_table(path)
        plot(args.out, training_out, args.out.with_suffix(".png"))
        return
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 -m benchmarks.scale.gpus")
    if args.device == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        parser.error(f"every process needs a GPU; there are {torch.cuda.device_count()}, and --device cpu needs none")
    budget = Budget(args.budget)
    ranks = Ranks(args.device)
    where: Row = environment(args.device) | (gpu_software() if args.device == "cuda" else {})
    rates = Rates()
    if "operators" in args.parts:
        operators(args, ranks, Table(args.out, ranks, where, ("operator", "T")), rates, budget)
    if "training" in args.parts:
        training(args, ranks, Table(training_out, ranks, where, KEY), rates, budget)
    if ranks.rank == 0:
        plot(args.out, training_out, args.out.with_suffix(".png"))
    ranks.say(f"wrote {args.out} and what is beside it")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
