"""The example of docs/distributed.md runs under torchrun, and its table of sizes is what the tests count."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_the_example_runs_and_the_loss_falls(tmp_path):
    (snippet,) = re.findall(r"```python\n(# train\.py.*?)```", PAGE, re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(snippet, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], run.stdout
    assert abs(losses[0] - torch.tensor(100.0).log()) < 0.3  # a model that knows nothing of 100 tokens


def test_the_table_of_sizes():
    """The formulas, with the numbers of `test_collectives.NUMBERS`, which are counted."""
    from tests.distributed.test_collectives import NUMBERS

    heads = {"HKV": 2, "HP": 4, "K": 3, "V": 5}
    rows = re.findall(r"^\| `(\w+)`(?:, order n)? \| `([^`]+)` \| (\d+) KiB", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for op, formula, kib in rows:
        python = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula).replace("^", "**")
        for n, name in ((2, op), (3, f"{op}3")) if op == "ahla" else ((2, {"hla_q": "hla_q4"}.get(op, op)),):
            assert eval(python, {**heads, "n": n}) == NUMBERS[name], formula
        assert round(eval(python, dict(HKV=8, HP=8, K=64, V=64, n=2)) * 4 / 1024) == int(kib)
