"""benchmarks.scale.gpus in a tiny setting on two processes: rows with the results of one process alone."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.scale.gpus_training import meshes_of
from tests.distributed.ranks import ROOT, TIMEOUT
from tests.text_helpers import write_corpus


def test_two_processes(tmp_path):
    out = tmp_path / "rows.csv"
    out.write_text("gpus,operator,T,error\n4,hla_q,64,\n2,hla_q,1,\n2,hla_q,64,old\n")  # what others measured stays
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = "--device cpu --operators hla_q --lengths 64 --seconds 0 --size tiny --tokens 16 --steps 2 --meshes 1x2x1"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*torchrun, "-m", "benchmarks.scale.gpus", *options.split(), "--out", str(out)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    *others, row = csv.DictReader(open(out))
    assert [(other["gpus"], other["T"], other["error"]) for other in others] == [("4", "64", ""), ("2", "1", "")]
    assert (row["gpus"], row["operator"], row["T"], row["error"]) == ("2", "hla_q", "64", "")
    assert max(float(row[f"error_{name}"]) for name in ("o", "q", "k", "v", "g", "ridge")) < 1e-5
    assert float(row["efficiency"]) > 0 and row["waiting_ms"] and float(row["piece_ms"]) > 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    alone, spread = csv.DictReader(open(tmp_path / "rows_training.csv"))
    assert [alone[x] for x in ("dp", "sp", "tp", "error")] == ["1", "1", "1", ""]
    assert [spread[x] for x in ("dp", "sp", "tp", "error")] == ["1", "2", "1", ""]
    assert spread["loss_first"] == alone["loss_first"] and float(spread["loss_difference"]) < 1e-3


def test_meshes():
    assert meshes_of(2) == [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
    assert meshes_of(8)[3:] == [(2, 4, 1), (2, 2, 2)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("memory", ["expandable_segments:True", "expandable_segments:False"])
def test_graphs_with_exchanges_train_as_eager_steps_do_and_end(memory, tmp_path):
    """Packed documents, cut into two pieces; the graphs are there until the process group ends."""
    corpus = write_corpus(tmp_path / "texts")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = "--size tiny --context 256 --batch-size 8 --steps 12 --sp 2".split()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    losses = []
    for graphs in ("--cuda-graphs", "--no-cuda-graphs"):
        out = tmp_path / graphs
        command = [*torchrun, "-m", "hla.cli", "train", str(corpus), "--out", str(out), *options, "--no-shard", graphs]
        run = subprocess.run(
            command, env=environment | {"PYTORCH_ALLOC_CONF": memory}, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert run.returncode == 0, run.stderr
        records = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
