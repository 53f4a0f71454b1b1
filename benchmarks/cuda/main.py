"""``python -m benchmarks.ops --device cuda``: the operators on one GPU, with their peers and ceilings, in one run.

bfloat16, causal, 32k tokens in all. Median milliseconds between CUDA events, all entries of a shape in turn; forward
without gradients, and forward + backward with the gradients of every tensor that training needs (of hla_q also those
of decay and ridge). An entry that fails or no longer fits the time is a row with an ``error``. Columns:

    floor_*_ms, *_fraction    what the cost counted in `benchmarks.cuda.counts` takes at the bandwidth and matmul rate
                              measured in the same run, and that as a fraction of the measured time
    *_vs_flash, *_vs_composed time of softmax attention (flash) or of the second order composed of two calls of fla's
                              first order (the faster form), divided by the row's
    peak_mib                  peak memory of forward + backward above the inputs
    saved_mib                 memory held for the backward pass, beyond the inputs and the output
    kernels_*                 CUDA kernels launched
    first_call_s              first forward + backward of this process, with whatever is compiled or tuned in it
    packed                    sequences of random length in one row, of B x T tokens in all
    difference                relative difference of the output from that of the entry that computes the same

Three CSV files are written beside each other, after every shape: OUT, OUT with _decode (one token, in CUDA graphs) and
OUT with _cold_start (new processes with an empty cache of compiled kernels); and a plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda import cold_start, decode, report
from benchmarks.cuda.counts import count, floor_ms
from benchmarks.cuda.entries import COMPOSED, FLASH, PEERS, Entry, Inputs, Shape, fla, own, softmax, variants
from benchmarks.cuda.guard import Budget, free, guarded
from benchmarks.cuda.probes import Ceilings, ceilings, kernels_launched
from benchmarks.measure import (
    environment,
    gpu_software,
    interleaved_medians,
    peak_bytes,
    saved_bytes,
    say,
    synchronize,
    write_csv,
)

SHAPES = ["8x4096x16x128", "4x8192x16x128", "2x16384x16x128", "1x32768x16x128", "8x4096x32x64"]
PARTS = ("shapes", "decode", "cold-start")
Row = dict[str, Any]


def measure(
    entries: list[Entry], shape: Shape, device: str, seconds: float, roof: Ceilings, budget: Budget
) -> list[Row]:
    """Rows of one shape."""
    references = {entry.same_as for entry in entries}
    outputs: dict[str, torch.Tensor] = {}
    errors: dict[str, list[str]] = {entry.name: [] for entry in entries}
    first: dict[str, float] = {}
    difference: dict[str, float] = {}
    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}

    def attempt(entry: Entry, what: str, function: Callable[..., Any], *args: Any, within: Budget | None = None) -> Any:
        result, error = guarded(function, *args, budget=within)
        if error:
            errors[entry.name].append(f"{what}: {error}" if what else error)
        return result

    def output(entry: Entry) -> torch.Tensor:
        o = entry.forward()
        synchronize(device)
        return o

    def backward(entry: Entry) -> bool:
        entry.both()
        synchronize(device)
        return True

    for entry in entries:
        say(f"  {entry.name} ...")
        start = time.perf_counter()
        o = attempt(entry, "", output, entry, within=budget)
        if o is None:
            continue
        forward[entry.name] = entry.forward
        if entry.has_backward and attempt(entry, "backward", backward, entry):
            both[entry.name] = entry.both
        first[entry.name] = time.perf_counter() - start
        if first[entry.name] > 5:
            say(f"    first call after {first[entry.name]:.0f} s")
        if entry.name in references:
            outputs[entry.name] = o
        if entry.same_as in outputs:
            reference = outputs[entry.same_as].float()
            difference[entry.name] = float((o.float() - reference).norm() / reference.norm())
        del o
    outputs.clear()

    times = {}
    for kind, functions in ("forward", forward), ("forward_backward", both):
        result, error = guarded(interleaved_medians, functions, device, seconds, 5)
        times[kind] = result or {}
        for name in functions if error else ():
            errors[name].append(error)

    rows: list[Row] = []
    for entry in entries:
        row: Row = {
            "operator": entry.name,
            **dict(zip("BTHD", shape, strict=True)),
            "kv_heads": entry.kv_heads,
            "packed": entry.sequences or "",
            "dtype": "bfloat16",
        }
        moved: dict[str, Any] = {}
        for kind, is_both in ("forward", False), ("forward_backward", True):
            ms = times[kind].get(entry.name)
            row[f"{kind}_ms"] = _rounded(ms, 4)
            moved[f"{kind}_mib"] = moved[f"{kind}_gflop"] = moved[f"floor_{kind}_ms"] = moved[f"{kind}_fraction"] = ""
            if entry.counted_as and (entry.has_backward or not is_both):
                tokens, length = shape.batch * shape.length, shape.length
                cost = count(entry.counted_as, tokens, length, shape.heads, entry.kv_heads, shape.dim, is_both)
                floor = floor_ms(*cost, *roof)
                moved[f"{kind}_mib"], moved[f"{kind}_gflop"] = round(cost[0] / 2**20), round(cost[1] / 1e9, 1)
                moved[f"floor_{kind}_ms"] = round(floor, 4)
                moved[f"{kind}_fraction"] = "" if ms is None else round(floor / ms, 3)
        memory = kernels = (None, None)
        if entry.name in forward:
            trains = entry.name in both
            memory = (
                attempt(entry, "memory", peak_bytes, entry.both, device) if trains else None,
                attempt(entry, "memory", saved_bytes, entry.function, device) if trains else None,
            )
            kernels = (
                attempt(entry, "kernels", kernels_launched, entry.forward, device),
                attempt(entry, "kernels", kernels_launched, entry.both, device) if trains else None,
            )
        row |= {name: _rounded(x and x / 2**20, 1) for name, x in zip(("peak_mib", "saved_mib"), memory, strict=True)}
        row |= {name: "" if x is None else x for name, x in zip(report.KERNELS, kernels, strict=True)}
        row["first_call_s"] = _rounded(first.get(entry.name), 2)
        row["difference"] = f"{difference[entry.name]:.1e}" if entry.name in difference else ""
        row |= moved
        row["error"] = "; ".join(dict.fromkeys(errors[entry.name]))
        rows.append(row)
    _add_ratios(rows)
    return rows


def _rounded(x: float | None, digits: int) -> float | str:
    return "" if x is None else round(x, digits)


def _add_ratios(rows: list[Row]) -> None:
    """Speed of each row against flash attention and against the faster composed form."""
    for kind in ("forward", "forward_backward"):
        column = f"{kind}_ms"
        for peer, name in ("flash", FLASH), ("composed", COMPOSED):
            times = [row[column] for row in rows if row["operator"].startswith(name) and row[column] != ""]
            for row in rows:
                same_task = row["kv_heads"] == row["H"] and row["packed"] == ""
                known = times and row[column] != "" and same_task
                row[f"{kind}_vs_{peer}"] = round(min(times) / row[column], 2) if known else ""


def _entries(shape: Shape, device: str, peers: list[str], with_fla: bool, with_variants: bool) -> list[Entry]:
    inputs = Inputs(shape, device)
    entries = own(inputs) + softmax(inputs, peers)  # what compiles for minutes comes last
    if with_variants:
        entries += variants(inputs)
    if with_fla:
        found, error = guarded(fla, inputs, peers)
        if error:
            say(f"flash-linear-attention can't be imported, its rows are left out ({error})")
        entries += found or []
    return entries


def _path(out: Path, part: str) -> Path:
    return out if part == "shapes" else out.with_stem(f"{out.stem}_{part.replace('-', '_')}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops --device cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxTxHxD", help="the first one has the variants")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--fla-shapes", nargs="*", metavar="BxTxHxD", help="shapes with the fla peers, which tune for minutes (first)"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 64, 1], help="batch sizes that decode")
    parser.add_argument("--caches", type=int, nargs="+", default=[4096, 32768], help="cache lengths of softmax decode")
    parser.add_argument("--seconds", type=float, default=0.2, help="measuring time per entry, forward and both")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing new starts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ops_cuda.csv"))
    parser.add_argument("--report", action="store_true", help="measure nothing: tables and plot of the files of OUT")
    args = parser.parse_args(arguments)
    args.shapes = [Shape.parse(text) for text in args.shapes]
    args.fla_shapes = args.shapes[:1] if args.fla_shapes is None else [Shape.parse(text) for text in args.fla_shapes]
    return args


def run(args: argparse.Namespace, device: str, shrink: int = 1) -> dict[str, list[Row]]:
    """Rows of all parts, each written as soon as it is measured.

    ``shrink`` makes the ceilings and cold starts small, for a try on a CPU.
    """
    budget = Budget(args.budget)
    where = environment(device) | gpu_software()
    roof = ceilings(device, args.seconds, gib=2.0 / shrink, n=8192 // shrink)
    say(f"copy {roof.bandwidth / 1e12:.2f} TB/s (read + written), 8192^3 matmul {roof.rate / 1e12:.0f} TFLOP/s")
    where |= {"copy_tb_s": f"{roof.bandwidth / 1e12:.3f}", "matmul_tflop_s": f"{roof.rate / 1e12:.1f}"}
    wants_fla = any(peer.startswith("fla") for peer in args.peers)
    if wants_fla and importlib.util.find_spec("fla") is None:
        say("flash-linear-attention is not installed: its rows are left out")
        wants_fla = False
    results: dict[str, list[Row]] = {part: [] for part in PARTS}

    def keep(part: str, rows: list[Row]) -> None:
        results[part] += [row | where for row in rows]
        write_csv(_path(args.out, part), results[part])

    for i, shape in enumerate(args.shapes if "shapes" in args.parts else ()):
        say(f"{shape} ... ({budget.left:.0f} s left)")
        with_fla = wants_fla and shape in args.fla_shapes
        entries, error = guarded(_entries, shape, device, args.peers, with_fla, i == 0, budget=budget)
        if error:
            say(f"  {error}")
            continue
        keep("shapes", measure(entries, shape, device, args.seconds, roof, budget))
        del entries
        free()
    heads, dim = args.shapes[0].heads, args.shapes[0].dim
    for batch in args.batches if "decode" in args.parts else ():
        say(f"decoding, B = {batch} ...")
        rows, error = guarded(
            decode.measure, batch, heads, dim, device, args.seconds, roof, args.caches, wants_fla, budget, budget=budget
        )
        if error:
            say(f"  {error}")
        else:
            keep("decode", rows)
        free()
    for operator in cold_start.OPERATORS if "cold-start" in args.parts else ():
        if budget.left <= 0:
            say(f"cold start of {operator} left out: time budget spent")
            continue
        say(f"cold start of {operator} ...")
        keep("cold-start", cold_start.measure(operator, heads, dim, device, max(30.0, budget.left), shrink))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.report:
        results = {part: report.read(_path(args.out, part)) for part in PARTS}
    elif torch.cuda.is_available():
        results = run(args, "cuda")
        say(f"wrote {args.out} and what is beside it")
    else:
        raise SystemExit("--device cuda needs a GPU that PyTorch can use; torch.cuda.is_available() is False")
    for task, *values in (report.print_tables, results), (report.plot, results["shapes"], args.out.with_suffix(".png")):
        _, error = guarded(task, *values)  # the machine that measures may lack what draws: --report elsewhere
        if error:
            say(f"{task.__name__}: {error}")
