"""``python -m benchmarks.resume``: seconds to read a prompt against milliseconds to resume from its state in a file.

The model has random weights, the prompt random tokens. Resuming is loading the file, which compares every weight of the
model with its fingerprint, and computing the logits after one more token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import environment, say, write_csv
from hla.generate import read
from hla.models import SIZES, HLACache, HLAConfig, HLAForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=11, help="loads to take the median of")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resume_cpu.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = HLAForCausalLM(HLAConfig(vocab_size=args.vocab_size, **SIZES[args.size])).eval()
    read(model, torch.randint(args.vocab_size, (1, 4096)))  # the first call of everything is slower
    where = environment("cpu")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.state"
        for tokens in args.tokens:
            ids = torch.randint(args.vocab_size, (1, tokens))
            start = time.perf_counter()
            cache, _ = read(model, ids)
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            cache.save(path)
            saving = 1e3 * (time.perf_counter() - start)
            resuming = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                read(model, [1], cache=HLACache.load(path, model))
                resuming.append(1e3 * (time.perf_counter() - start))
            row = {
                "size": args.size,
                "tokens": tokens,
                "read_s": round(seconds, 2),
                "save_ms": round(saving, 1),
                "resume_ms": round(statistics.median(resuming), 1),
                "file_bytes": path.stat().st_size,
            }
            say("  ".join(f"{name} {value}" for name, value in row.items()))
            rows.append(row | where)
    write_csv(args.out, rows)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
