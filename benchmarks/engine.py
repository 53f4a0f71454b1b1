"""``python -m benchmarks.engine``: tokens per second for many requests, one by one and in the slots of an engine.

The same requests (random prompts of random lengths, random weights, greedy) go through `hla.generate.stream` one after
the other and through `hla.generate.Engine` with several numbers of slots, in alternating rounds. Prompts are counted in
the time, only new tokens in the rate.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import environment, say, synchronize, write_csv
from hla.generate import Engine, stream
from hla.models import SIZES, HLAConfig, HLAForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=100, help="most new tokens of a request")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_cpu.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = HLAForCausalLM(HLAConfig(**SIZES[args.size])).eval().to(args.device, getattr(torch, args.dtype))
    rng, vocabulary = random.Random(0), range(model.config.vocab_size)
    asked = [
        (rng.choices(vocabulary, k=rng.randint(1, args.prompt)), rng.randint(1, args.tokens))
        for _ in range(args.requests)
    ]
    new_tokens = sum(count for _, count in asked)

    def one_by_one() -> None:
        for ids, count in asked:
            for _ in stream(model, ids, max_tokens=count, temperature=0):
                pass

    def through(engine: Engine) -> Callable[[], None]:
        def run() -> None:
            for ids, count in asked:
                engine.submit(ids, max_tokens=count, temperature=0, stop_ids=())
            engine.run()

        return run

    ways: dict[str, Callable[[], None]] = {"stream": one_by_one}
    ways |= {f"engine({slots})": through(Engine(model, slots)) for slots in args.slots}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(args.rounds + 1):
        for name, run in ways.items():
            synchronize(args.device)
            start = time.perf_counter()
            run()
            synchronize(args.device)
            if r:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    where = environment(args.device)
    rows: list[dict[str, object]] = []
    for name, times in seconds.items():
        rate = new_tokens / statistics.median(times)
        say(f"{name:10}: {rate:8.1f} new tokens per second")
        row = {"size": args.size, "dtype": args.dtype, "way": name, "requests": args.requests, "new_tokens": new_tokens}
        rows.append(row | {"prompt_tokens": sum(len(ids) for ids, _ in asked), "tokens_per_s": round(rate, 1)} | where)
    write_csv(args.out, rows)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
