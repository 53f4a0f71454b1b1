"""Where the time of an operator goes: microseconds of each of its kernels, by PyTorch's profiler.

    python -m benchmarks.cuda.kernels 8x4096x16x128 16x2048x16x64 --operators "hla_q default form" hla2

prints them for one forward and backward pass, the longest first, and writes ``--out`` (a row per kernel, with device,
versions and commit). Kernels that overlap count twice where they do, and what the host costs does not count: the times
of whole passes are those of ``python -m benchmarks.ops``. ``--device cpu`` is a try without a GPU, which lists what
PyTorch's CPU operations took.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda.entries import OWN, Entry, Inputs, Shape, own
from benchmarks.measure import environment, gpu_software, synchronize, write_csv

PASSES = 10
WARM_UP = 3
COLUMNS = ("operator", "shape", "kernel", "calls", "microseconds")


def kernels(entry: Entry, device: str, passes: int = PASSES) -> list[tuple[str, float, float]]:
    """(name, calls, microseconds) of every kernel of a forward and backward pass, the longest first."""
    for _ in range(WARM_UP):
        entry.both()
    synchronize(device)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        for _ in range(passes):
            entry.both()
        synchronize(device)
    rows = []
    for event in found.key_averages():
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu == (device == "cuda"):
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append((event.key, event.count / passes, time / passes))
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shapes", nargs="+", type=Shape.parse, help="batch x tokens x heads x head size")
    parser.add_argument("--operators", nargs="+", choices=OWN, default=["hla_q default form", "hla2"])
    parser.add_argument("--least", type=float, default=1.0, help="microseconds; shorter kernels are left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ops_DEVICE_kernels.csv")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu is a try without one")
    out: Path = args.out or Path(f"benchmarks/results/ops_{args.device}_kernels.csv")
    where = environment(args.device) | (gpu_software() if args.device == "cuda" else {})
    table: list[dict[str, Any]] = []
    for shape in args.shapes:
        entries = {entry.name: entry for entry in own(Inputs(shape, args.device))}
        for name in args.operators:
            found = kernels(entries[name], args.device)
            print(f"\n{name}, {shape}: {sum(time for *_, time in found):,.0f} us", flush=True)
            for kernel, calls, time in found:
                if time < args.least:
                    break
                print(f"{time:10.1f} {calls:5.4g} x {kernel[:80]}")
                row = dict(zip(COLUMNS, (name, str(shape), kernel, f"{calls:g}", f"{time:.1f}"), strict=True))
                table.append(row | where)
    if not table:
        parser.error(f"no kernel takes {args.least:g} microseconds")
    write_csv(out, table)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
