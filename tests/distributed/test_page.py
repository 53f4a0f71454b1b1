"""The example of docs/distributed.md runs under torchrun, and its table of sizes is what the tests count."""

from __future__ import annotations

import re

import torch

from tests.distributed.ranks import ROOT, run_snippet

PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_the_example_runs_and_the_loss_falls(tmp_path):
    losses = run_snippet(PAGE, "# train.py", 2, tmp_path)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], losses
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
