"""``python -m benchmarks.training --device cuda``: tokens per second of training whole models on one GPU.

HLA models of the sizes of `hla.models.SIZES` with random weights, beside the same model with softmax attention in every
layer, that one with as many weights as HLA (a wider MLP), a Llama of transformers and flash-linear-attention's
GatedDeltaNet and GLA (where they import) of the same width, depth, heads and vocabulary. All are trained as `hla train`
does it: float32 weights, bfloat16 autocast, loss in pieces (`hla.loss`), clipping, AdamW (fused); attention takes cuDNN
where it can, else flash. A call is one optimizer step over ``--tokens`` tokens in all: as many rows of T tokens as that
makes, in micro-batches of up to ``MICRO`` tokens, the same for all models of a row. Rows longer than that have their
activations recomputed layer by layer. Where models fit beside each other they take turns, step by step. With
``--graphs`` forward and backward passes of all models are CUDA graphs (`hla.graphed`), which is how `hla train` runs on
one GPU; without, Python launches every kernel. Columns:

    micro_batch     rows at a time
    graphs          1 with ``--graphs``
    ms_per_step     median, between CUDA events
    model_flops     per token, forward and backward without recomputation: ``6 N + 3 L (mixer)``, N the weights in
                    linear maps (head included, embedding not), L layers, per head of width D and token forward
                        softmax     2 T D           scores and reading of half of T tokens, 2 products of 2 FLOPs
                        HLA         2 (2 + order + 1) D^2     writing S and P, readings of S, one of P
                        delta rule  6 D^2           reading, writing, reading
                        GLA         4 D^2           writing, reading
                    (as recurrences, however it is computed: work that only chunks or checkpointing cause is no credit)
    mfu             model_flops x tokens per second / the 989 TFLOP/s of the H100's data sheet (bfloat16, dense)
    mfu_measured    the same of the matmul rate measured in this run
    peak_mib        largest memory in use during a step: this model's weights, moments, gradients and activations (with
                    graphs in use between steps, too, for they keep their memory)
    vs_softmax      tokens per second, divided by those of the same model with softmax attention

``--longest`` measures something else: the longest sequence one step can train on, T doubling until memory or the time
for a step (``--step-seconds``) ends. Whole sequences with recomputation, HLA and softmax; and HLA piece by piece
(`hla.pieces`), whose gradient is that of the whole sequence: ``loss`` and ``gradient_norm`` are those of the same
weights and tokens in all rows, ``difference`` is that of the gradients of one piece whole and cut into four.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cuda.guard import Budget, free, guarded
from benchmarks.cuda.probes import ceilings
from benchmarks.generation import head_size, new_delta, new_gla, new_hla, new_softmax
from benchmarks.measure import environment, gpu_software, interleaved_medians, peak_bytes, say, synchronize, write_csv
from benchmarks.training_report import DELTA, GLA, HLA, LLAMA, SOFTMAX, WIDER, Row, plot, print_table
from hla.build import recompute_activations
from hla.graphed import EAGER, Graphed, Pool
from hla.loss import summed_cross_entropy
from hla.models import SIZES, HLAConfig, HLAForCausalLM, count_parameters
from hla.pieces import backward_in_pieces
from hla.update import clip_and_step

DATA_SHEET = 989e12  # FLOP/s
# Tokens of a micro-batch whose activations fit into 80 GB beside the weights and moments; a longer row is recomputed.
MICRO = {"tiny": 32768, "small": 32768, "base": 32768, "medium": 32768, "large": 16384}
TOGETHER = 4e8  # parameters: up to so many, all models of a size are in memory at once and take turns
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def new_own_softmax(size: str) -> HLAForCausalLM:
    """The HLA model with softmax attention in the place of every mixer."""
    settings = SIZES[size]
    return HLAForCausalLM(HLAConfig(**settings, layer_types=["full_attention"] * settings["num_hidden_layers"]))


def new_wider_softmax(size: str) -> HLAForCausalLM:
    """The same with an MLP so much wider, in steps of 64, that it has as many weights as HLA."""
    settings = dict(SIZES[size])
    layers = settings["num_hidden_layers"]
    softmax = HLAConfig(**settings, layer_types=["full_attention"] * layers)
    missing = count_parameters(HLAConfig(**settings)) - count_parameters(softmax)
    settings["intermediate_size"] += 64 * round(missing / (3 * layers * settings["hidden_size"] * 64))
    return HLAForCausalLM(HLAConfig(**settings, layer_types=["full_attention"] * layers))


MAKERS: dict[str, Callable[[str], Any]] = {
    HLA: new_hla, SOFTMAX: new_own_softmax, WIDER: new_wider_softmax, LLAMA: new_softmax, DELTA: new_delta,
    GLA: new_gla,
}  # fmt: skip


class Trained:
    """A model in training with its optimizer; the first, small step allocates the moments."""

    def __init__(self, kind: str, size: str, device: str, lr: float = 1e-4, compile: bool = False):
        torch.manual_seed(0)
        with torch.device(device):
            self.model = MAKERS[kind](size).train()
        self.kind, self.size, self.device = kind, size, device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.held = 3 * 4 * self.parameters  # bytes between steps
        self.recomputes = False
        self.graphed: Graphed | None = None
        self.step(*batch(1, 128, device), 1)
        for layer in self.model.model.layers if compile else ():
            layer.forward = torch.compile(layer.forward)  # inside of checkpointing, which stays eager

    def recompute(self) -> None:
        if not self.recomputes:
            recompute_activations(self.model)
        self.recomputes = True

    def capture(self, pool: Pool | None) -> None:
        """From now on with CUDA graphs, whose memory models that take turns share (without a pool, on a CPU: none)."""
        self.release()
        self.graphed = Graphed(self.loss, self.model.parameters(), pool)

    def release(self) -> None:
        """Without graphs again; their memory is free."""
        self.graphed = None
        self.clear()

    def clear(self) -> None:
        if self.graphed is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.graphed.zero_grad()

    def loss(self, ids: Tensor, targets: Tensor, total: int) -> Tensor:
        """Sum over the tokens, divided by ``total``."""
        # (Without the cache of casts, as `hla.loss.mean_loss`.)
        half = self.device == "cuda"
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=half, cache_enabled=False):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            return summed_cross_entropy(hidden.flatten(0, 1), self.model.lm_head, targets.flatten()) / total

    def backward(self, ids: Tensor, targets: Tensor, rows: int) -> Tensor:
        """The mean loss; its gradient is left in the parameters."""
        total = torch.zeros((), device=self.device)
        for some, wanted in zip(ids.split(rows), targets.split(rows), strict=True):
            if self.graphed is None:
                part = self.loss(some, wanted, targets.numel())
                part.backward()
            else:
                part = self.graphed(ids=some, targets=wanted, total=targets.numel())
            total += part.detach()
        return total

    def update(self, loss: Tensor) -> Tensor:
        """An optimizer step; returns the norm of the gradient."""
        return clip_and_step(self.optimizer, 1.0, loss)

    def step(self, ids: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        try:
            loss = self.backward(ids, targets, rows)
            return loss, self.update(loss)
        finally:  # what runs out of memory must not leave gradients behind
            self.clear()

    def step_in_pieces(self, ids: Tensor, targets: Tensor, piece: int) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        try:
            loss = backward_in_pieces(self.model, ids, targets, piece=piece, dtype=dtype)
            return loss, self.update(loss)
        finally:
            self.optimizer.zero_grad(set_to_none=True)


def batch(rows: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Random tokens, and those that follow them."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(HLAConfig().vocab_size, (rows, length + 1), generator=generator, device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def one_document_per_row() -> AbstractContextManager[Any]:
    """Tells transformers (for Llama) what it would find out by waiting for the GPU.

    While a graph is captured it does not wait, and builds a mask in the place of plain causality, just in case.
    """
    return mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)


def model_flops(trained: Trained, length: int) -> float:
    """FLOPs of training per token; see above."""
    size, model = SIZES[trained.size], trained.model
    maps = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    dim = head_size(trained.size)
    per_head = {
        HLA: 2 * (HLAConfig().order + 3) * dim**2,
        SOFTMAX: 2 * length * dim,
        WIDER: 2 * length * dim,
        LLAMA: 2 * length * dim,
        DELTA: 6 * dim**2,
        GLA: 4 * dim**2,
    }[trained.kind]
    return 6 * maps + 3 * size["num_hidden_layers"] * size["num_attention_heads"] * per_head


# ------------------------------------------------------------------------------------------------------ throughput


def measure_size(args: argparse.Namespace, size: str, rate: float, budget: Budget, keep: Callable[[Row], None]) -> None:
    """Rows of a size: every context and model."""
    together = count_parameters(HLAConfig(**SIZES[size])) <= TOGETHER
    groups = [args.models] if together else [[kind] for kind in args.models]
    softmax_speed: dict[int, float] = {}
    for kinds in sorted(groups, key=lambda group: SOFTMAX not in group):  # the one that others are compared with first
        models = {kind: guarded(Trained, kind, size, args.device, 1e-4, args.compile, budget=budget) for kind in kinds}
        for length in args.contexts:
            for row in measure_together(args, models, size, length, rate, budget):
                if row["model"] == SOFTMAX and row["tokens_per_s"]:
                    softmax_speed[length] = row["tokens_per_s"]
                base = softmax_speed.get(length)
                ratio = round(row["tokens_per_s"] / base, 3) if base and row["tokens_per_s"] else ""
                keep({**row, "vs_softmax": ratio})
        del models
        free()


def measure_together(
    args: argparse.Namespace, models: dict[str, tuple[Trained | None, str]], size: str, length: int, rate: float,
    budget: Budget,
) -> list[Row]:  # fmt: skip
    """Rows of models that take turns; the softmax model's first."""
    rows_in_all = max(1, args.tokens // length)
    micro = max(1, min(rows_in_all, MICRO[size] // length))
    ids, targets = batch(rows_in_all, length, args.device)
    steps: dict[str, Callable[[], object]] = {}
    memory: dict[str, int | None] = {}
    errors = {kind: error for kind, (_, error) in models.items()}
    captured = args.graphs and args.device == "cuda"
    pool = Pool.on(torch.device("cuda", torch.cuda.current_device())) if captured else None
    for kind, (trained, _) in models.items():
        if trained is None:
            continue
        if length > MICRO[size]:
            trained.recompute()
        if args.graphs:
            trained.capture(pool)

        def step(trained: Trained = trained) -> object:
            return trained.step(ids, targets, micro)

        def first(step: Callable[[], object] = step) -> None:
            for _ in range(EAGER + 1 if args.graphs else 1):  # until everything is captured
                step()

        start = time.perf_counter()
        memory[kind], errors[kind] = guarded(peak_bytes, first, args.device, budget=budget)
        say(f"{size}, {length} tokens, {kind}: first steps {time.perf_counter() - start:.1f} s {errors[kind]}")
        if not errors[kind]:
            steps[kind] = step
    times, error = guarded(interleaved_medians, steps, args.device, args.seconds)
    if error:  # of one of them, whichever it was
        times = {}
        for kind, one in steps.items():
            alone, errors[kind] = guarded(interleaved_medians, {kind: one}, args.device, args.seconds, budget=budget)
            times |= alone or {}
    result = []
    for kind in sorted(models, key=lambda kind: kind != SOFTMAX):
        trained, ms = models[kind][0], times.get(kind)
        speed = None if ms is None else 1e3 * ids.numel() / ms
        flops = None if trained is None else model_flops(trained, length)
        peak = memory.get(kind)
        say(f"{size}, {length} tokens, {kind}: " + (f"{ms:.1f} ms, {speed:,.0f} tokens/s" if ms else "no time"))
        result.append(
            {
                "model": kind, "size": size, "parameters": "" if trained is None else trained.parameters, "T": length,
                "batch": rows_in_all, "micro_batch": micro, "recompute": int(length > MICRO[size]),
                "compile": int(args.compile), "graphs": int(args.graphs),
                "ms_per_step": "" if ms is None else round(ms, 2),
                "tokens_per_s": "" if speed is None else round(speed), "model_flops": flops or "",
                "mfu": _share(flops, speed, DATA_SHEET), "mfu_measured": _share(flops, speed, rate),
                "peak_mib": "" if peak is None or trained is None else round((peak + trained.held) / 2**20),
                "error": errors[kind],
            }
        )  # fmt: skip
        if trained is not None and args.graphs:
            trained.release()
    return result


def _share(flops: float | None, speed: float | None, rate: float) -> float | str:
    return "" if flops is None or speed is None else round(flops * speed / rate, 4)


def throughput(args: argparse.Namespace, out: Path, where: Row, rate: float, budget: Budget) -> list[Row]:
    rows: list[Row] = []

    def keep(row: Row) -> None:
        error = row.pop("error")
        rows.append({**row, "error": error, **where})
        write_csv(out, rows)

    for size in args.sizes:
        measure_size(args, size, rate, budget, keep)
    return rows


# ------------------------------------------------------------------------------------------------ longest sequence


def longest(args: argparse.Namespace, out: Path, where: Row, budget: Budget) -> list[Row]:
    """Rows of one sequence, T doubling from the shortest context to the longest, until a step fits no longer."""
    rows: list[Row] = []
    size = args.sizes[0]
    lengths = [args.contexts[0] << i for i in range(32) if args.contexts[0] << i <= args.contexts[-1]]
    for kind, piece in ((HLA, None), (HLA, args.piece), (SOFTMAX, None)):
        method = "recompute" if piece is None else f"pieces of {piece}"
        # With a learning rate of 0 every row has the same weights.
        trained, error = guarded(Trained, kind, size, args.device, 0.0, budget=budget)
        difference: float | str = ""
        if trained is not None and piece is None:
            trained.recompute()
        elif trained is not None:
            difference, error = guarded(gradient_difference, trained, piece, budget=budget)
        seconds = 0.0
        for length in lengths:
            growth = 2 if kind == HLA else 4
            if growth * seconds > min(args.step_seconds, budget.left):
                error = f"left out: a step would take about {growth * seconds:.0f} s"
            found = None
            if trained is not None and not error:
                # Twice at the shortest length, whose first step compiles.
                for _ in range(2 if length == lengths[0] else 1):
                    found, error = guarded(one_step, trained, length, piece, budget=budget)
            row: Row = {"model": kind, "size": size, "method": method, "T": length}
            for name in ("seconds", "tokens_per_s", "peak_mib", "loss", "gradient_norm"):
                row[name] = "" if found is None else found[name]
            seconds = seconds if found is None else found["seconds"]
            row |= {"difference": difference, "error": error, **where}
            difference = ""
            rows.append(row)
            write_csv(out, rows)
            say(f"{size}, {kind}, {method}, {length} tokens: {f'{seconds:.2f} s' if found else error}")
            if found is None:
                break
        del trained
        free()
    return rows


def one_step(trained: Trained, length: int, piece: int | None) -> Row:
    """Time and memory of a single step on a single sequence."""
    ids, targets = batch(1, length, trained.device)
    found: list[Any] = []

    def step() -> None:
        synchronize(trained.device)
        start = time.perf_counter()
        result = trained.step(ids, targets, 1) if piece is None else trained.step_in_pieces(ids, targets, piece)
        loss, norm = (float(x) for x in result)  # waits for the device
        found[:] = time.perf_counter() - start, loss, norm

    free()
    peak = peak_bytes(step, trained.device)
    seconds, loss, norm = found
    return {
        "seconds": round(seconds, 3), "tokens_per_s": round(length / seconds),
        "peak_mib": "" if peak is None else round((peak + trained.held) / 2**20),
        "loss": round(loss, 6), "gradient_norm": round(norm, 6),
    }  # fmt: skip


def gradient_difference(trained: Trained, length: int) -> str:
    """Of all gradients together, a sequence in four pieces from the whole, relative."""
    ids, targets = batch(1, length, trained.device)
    dtype = torch.bfloat16 if trained.device == "cuda" else torch.float32
    try:
        trained.backward(ids, targets, 1)
        whole = [p.grad for p in trained.model.parameters()]
        trained.optimizer.zero_grad(set_to_none=True)
        backward_in_pieces(trained.model, ids, targets, piece=length // 4, dtype=dtype)
        squares = [
            (float((p.grad - x).square().sum()), float(x.square().sum()))
            for p, x in zip(trained.model.parameters(), whole, strict=True)
        ]
    finally:
        trained.optimizer.zero_grad(set_to_none=True)
    difference, size = (sum(x) for x in zip(*squares, strict=True))
    return f"{(difference / size) ** 0.5:.1e}"


# ------------------------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--longest", action="store_true", help="the longest sequence instead of the speed")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: base medium large; longest: medium")
    parser.add_argument("--contexts", type=int, nargs="+", help="default: 2048 8192 32768; longest: 32768 to 1048576")
    parser.add_argument("--models", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--tokens", type=int, default=32768, help="of a step")
    parser.add_argument("--compile", action="store_true", help="every layer of every model with torch.compile")
    parser.add_argument("--graphs", action="store_true", help="forward and backward of every model as CUDA graphs")
    parser.add_argument("--piece", type=int, default=16384, help="tokens of a piece of the longest sequence")
    parser.add_argument("--step-seconds", type=float, default=40.0, help="of the longest sequence: no longer steps")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring per row")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which nothing new starts")
    parser.add_argument("--report", action="store_true", help="measure nothing: table and plot of the rows in OUT")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/training_DEVICE[_compiled|_graphs|_longest].csv"
    )
    args = parser.parse_args()
    if args.graphs and (args.compile or args.longest):
        parser.error("--graphs goes neither with --compile nor with --longest")
    args.sizes = args.sizes or (["medium"] if args.longest else ["base", "medium", "large"])
    args.contexts = sorted(args.contexts or ([32768, 1 << 20] if args.longest else [2048, 8192, 32768]))
    if not args.report and importlib.util.find_spec("fla") is None and {DELTA, GLA} & {*args.models}:
        say("flash-linear-attention is not installed: its rows are left out")
        args.models = [kind for kind in args.models if kind not in (DELTA, GLA)]
    suffix = "_longest" if args.longest else "_compiled" if args.compile else "_graphs" if args.graphs else ""
    out = args.out or Path(f"benchmarks/results/training_{args.device}{suffix}.csv")
    if args.report:
        if not out.is_file():
            parser.error(f"there are no rows in {out} yet: measure first, without --report")
        with open(out, newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
    else:
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU that PyTorch can use; --device cpu is a try without one")
        where: Row = environment(args.device) | (gpu_software() if args.device == "cuda" else {})
        with sdpa_kernel(BACKENDS, set_priority=True), one_document_per_row() if args.graphs else nullcontext():
            rows = measure(args, out, where)
        say(f"wrote {out}")
    print_table(rows)
    if not args.longest:
        _, error = guarded(plot, rows, out.with_suffix(".png"))  # the machine that measures may lack what draws
        say(error or f"wrote {out.with_suffix('.png')}")


def measure(args: argparse.Namespace, out: Path, where: Row) -> list[Row]:
    budget = Budget(args.budget)
    if args.longest:
        return longest(args, out, where, budget)
    small = args.device == "cpu"
    rate = ceilings(args.device, 0.1, 0.01 if small else 2.0, 512 if small else 8192).rate
    return throughput(args, out, where | {"matmul_tflop_s": f"{rate / 1e12:.1f}"}, rate, budget)


if __name__ == "__main__":
    main()
