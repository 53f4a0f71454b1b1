"""Kill training with SIGKILL again and again, go on each time, and hold the result against a run that nobody killed.

``python -m tests.killed_runs --moments 20`` kills at random moments, ``--calls 0 5`` at the first and the sixth call
that changes a name or waits for the disk (in between a checkpoint is half written). Runs are forked from one process,
so that each attempt costs a moment instead of a start of PyTorch. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

import hla.models  # noqa: F401  imported before the forks, so that they need not
import hla.train
from hla.errors import HLAError
from tests.text_helpers import micro_config, write_corpus

STEPS = 8


def train(out: Path, kill_at_call: int | None = None) -> None:
    """The run itself, in a forked process; never returns."""
    if kill_at_call is not None:
        left = [kill_at_call]

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "rename", "replace"):
            setattr(os, name, dying(getattr(os, name)))
        hla.checkpoint._exchange = dying(hla.checkpoint._exchange)  # type: ignore[assignment]
    screen = io.StringIO()
    settings = {"steps": STEPS, "save_every": 2, "eval_every": 3, "telemetry_every": 4, "resume": True, "lr": 1e-2}
    try:
        hla.train.train(micro_config(out.parent / "corpus", out, **settings), Console(file=screen))
    except HLAError as error:
        print(f"{error}\n{screen.getvalue()}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def attempt(out: Path, *, delay: float | None = None, call: int | None = None) -> tuple[bool, bool]:
    """One process of the run: (whether it was killed, and while it wrote a checkpoint)."""
    child = os.fork()
    if child == 0:
        try:
            train(out, call)
        finally:
            os._exit(2)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True, any((out / "checkpoints").glob(".step-*"))
    if os.WEXITSTATUS(status):
        raise SystemExit(f"the run ended with status {os.WEXITSTATUS(status)}")
    return False, False


def result(out: Path) -> tuple[list[tuple[int, str, float]], list[list[tuple[str, bytes]]]]:
    """Everything that must be the same to the bit: all that was logged but times, the checkpoint, the model."""
    timed = ("seconds", "tokens_per_second", "step")
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    logged = [(r["step"], name, value) for r in records for name, value in r.items() if name not in timed]
    last = out / "checkpoints" / f"step-{STEPS:08d}"
    assert len(list((out / "checkpoints").iterdir())) == 2
    files = [*last.glob("*.safetensors"), out / "model.safetensors"]
    # Not the files: safetensors writes its metadata in an order that changes.
    return logged, [sorted((name, x.numpy().tobytes()) for name, x in load_file(file).items()) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=0)
    parser.add_argument("--calls", type=int, nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp())
    write_corpus(root / "corpus", count=6, words=60)
    begin = time.monotonic()
    attempt(root / "whole")
    whole, seconds = result(root / "whole"), time.monotonic() - begin
    kills = writing = runs = 0

    def compare(out: Path) -> None:
        assert result(out) == whole, f"{out.name} differs from the run that was not killed"
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        shutil.rmtree(out)

    while kills < args.moments:
        out, finished = root / f"random{runs}", False
        while kills < args.moments and not finished:
            killed, wrote = attempt(out, delay=rng.uniform(0, seconds))
            kills, writing, finished = kills + killed, writing + wrote, not killed
        attempt(out)
        compare(out)
        runs += 1
    for call in args.calls:
        out = root / f"call{call}"
        killed, wrote = attempt(out, call=call)
        kills, writing = kills + killed, writing + wrote
        attempt(out)
        compare(out)
        runs += 1
    shutil.rmtree(root)
    print(json.dumps({"kills": kills, "while_writing": writing, "runs": runs, "seconds_of_a_run": round(seconds, 2)}))


if __name__ == "__main__":
    main()
