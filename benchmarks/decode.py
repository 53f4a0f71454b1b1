"""``python -m benchmarks.decode``: milliseconds per token of a model while it writes, at several positions.

The state of an HLA model does not grow, so a token late in a text must cost what an early one costs. The model has
random weights; positions are reached by reading a random prompt in pieces.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.measure import environment, say, synchronize, write_csv
from hla.models import SIZES, HLACache, HLAConfig, HLAForCausalLM


@torch.inference_mode()
def read(model: HLAForCausalLM, cache: HLACache, tokens: int, piece: int) -> None:
    """Reads ``tokens`` random ids into the cache."""
    while tokens:
        count = min(tokens, piece)
        ids = torch.randint(model.config.vocab_size, (1, count), device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens -= count


@torch.inference_mode()
def milliseconds_per_token(model: HLAForCausalLM, cache: HLACache, tokens: int) -> float:
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    times = []
    for _ in range(tokens):
        synchronize(model.device.type)
        start = time.perf_counter()
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        synchronize(model.device.type)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--tokens", type=int, default=40, help="tokens timed at each position")
    parser.add_argument("--piece", type=int, default=4096, help="tokens read at a time on the way")
    parser.add_argument("--rounds", type=int, default=3, help="alternating measurements of all positions")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_cpu.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = HLAForCausalLM(HLAConfig(**SIZES[args.size])).eval().to(args.device)
    caches: dict[int, HLACache] = {}
    for position in args.positions:
        start = time.perf_counter()
        caches[position] = HLACache(model.config)
        read(model, caches[position], position, args.piece)
        say(f"read {position} tokens in {time.perf_counter() - start:.0f} s")
    times: dict[int, list[float]] = {position: [] for position in args.positions}
    for _ in range(args.rounds):
        for position in args.positions:
            times[position].append(milliseconds_per_token(model, caches[position], args.tokens))
    where = environment(args.device)
    rows: list[dict[str, object]] = []
    for position in args.positions:
        milliseconds = statistics.median(times[position])
        say(f"position {position:>7}: {milliseconds:.2f} ms per token")
        rows.append({"size": args.size, "position": position, "ms_per_token": round(milliseconds, 3)} | where)
    write_csv(args.out, rows)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
