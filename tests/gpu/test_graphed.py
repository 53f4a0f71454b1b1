"""On a CUDA GPU: training with captured micro-batches is training without, to the bit.

(The kernels of HLA add in a fixed order. So does attention operation by operation, which flash attention does not.)
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hla.build import build_model, build_optimizer, recompute_activations
from hla.data import build_tokenizer, encode_documents
from hla.errors import HLAError
from hla.graphed import EAGER, Graphed, GraphedTraining
from hla.train import train, train_step
from hla.train_config import TrainConfig
from tests.text_helpers import documents, micro_config, write_corpus

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MODEL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
BYTES = build_tokenizer("bytes", 0, [])
LONG, SHORT = encode_documents(BYTES, documents(3, words=600)), encode_documents(BYTES, documents(60, words=20))


def batches(packed: bool) -> list[list]:
    """Six steps of two micro-batches, the last one of them of other shapes."""
    stream = SHORT if packed else LONG
    steps = [[stream.pack([(512 * i + 7 * j, 256) for j in (0, 1)]) for i in (n % 3, 0)] for n in range(5)]
    assert ("cu_seq_lens_q" in steps[0][0].inputs(torch.device("cpu"))) == packed
    return [*steps, [stream.pack([(5, 256)]), stream.pack([(9, 256), (50, 256)])]]


def trained(attention: str, packed: bool, recompute: bool, graphs: bool):
    """(losses and norms, weights, graphs captured)."""
    config = TrainConfig(attention=attention, model={**MODEL, "initializer_range": 0.1})
    model = build_model(config, BYTES).to("cuda").train()
    if recompute:
        recompute_activations(model)
    graphed = GraphedTraining(model, torch.bfloat16) if graphs else None
    optimizer = build_optimizer(model, 1e-2, 0.1)
    how = {"clip": 0.5, "dtype": torch.bfloat16, "graphed": graphed}
    with sdpa_kernel(SDPBackend.MATH):
        numbers = [train_step(model, optimizer, step, **how) for step in batches(packed)]
    return numbers, list(model.parameters()), len(graphed.graphed._captured) if graphed else 0


@pytest.mark.parametrize(
    "attention,packed,recompute",
    [("hla", False, False), ("hla", True, True), ("hla,softmax", False, True), ("hla,softmax", True, False)],
)
def test_the_numbers_are_those_without(attention, packed, recompute):
    numbers, weights, captured = trained(attention, packed, recompute, graphs=True)
    expected, reference, _ = trained(attention, packed, recompute, graphs=False)
    # The first of a step and the second; the shapes of the last step come once.
    assert captured == (0 if packed and "softmax" in attention else 2)
    assert numbers == expected and all(map(torch.equal, weights, reference))
    assert expected[0][0] != expected[-1][0] and max(norm for _, norm in expected) > 0.5  # it learns, it clips


def test_every_shape_has_its_graph():
    model = build_model(TrainConfig(model=MODEL), BYTES).to("cuda").train()
    graphed = GraphedTraining(model, torch.bfloat16)
    other, one = (LONG.pack([(i, 256) for i in range(rows)]) for rows in (2, 1))
    losses: dict[int, list[float]] = {1: [], 2: []}
    for batch in [other, one] * (EAGER + 2):
        rows = batch.targets.numel() // 256
        losses[rows].append(graphed(batch.inputs(model.device), batch.targets[0].cuda(), 512).item())
    assert len(graphed.graphed._captured) == 2
    assert all(len(set(found)) == 1 for found in losses.values()), losses  # weights did not change, memory is shared
    once = [p.grad.clone() for p in model.parameters()]
    graphed.zero_grad()
    for batch in [other, one] * (EAGER + 2):
        graphed(batch.inputs(model.device), batch.targets[0].cuda(), 512)
    assert len(graphed.graphed._captured) == 3
    for p, grad in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, grad)
    for first in (one, other):  # each writes what it finds, where the other one reads it
        sums = []
        for batches in ([first], [first, other]):
            graphed.zero_grad()
            for batch in batches:
                graphed(batch.inputs(model.device), batch.targets[0].cuda(), 512)
            sums.append([p.grad.clone() for p in model.parameters()])
        graphed.zero_grad()
        graphed(other.inputs(model.device), other.targets[0].cuda(), 512)
        for p, a, b in zip(model.parameters(), *sums, strict=True):
            torch.testing.assert_close(a + p.grad, b)
    assert len(graphed.graphed._captured) == 4
    model.zero_grad(set_to_none=True)
    with pytest.raises(HLAError, match=r"zero_grad\(set_to_none=False\)"):
        graphed(one.inputs(model.device), one.targets[0].cuda(), 512)


def test_runs_are_the_same_with_and_without_and_gone_on_with(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", count=30, words=60)
    options = {
        "context": 256, "batch_size": 2, "accumulate": 2, "steps": 8, "save_every": 4, "eval_every": 3,
        "telemetry_every": 3, "device": "cuda", "dtype": "bfloat16", "model": MODEL,
    }  # fmt: skip

    def run(name: str, **settings: object) -> list[float]:
        result = train(micro_config(corpus, tmp_path / name, **options, **settings))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [*(json.loads(line)["loss"] for line in lines if '"loss"' in line), result.evaluation.loss]

    whole = run("graphs")
    assert len(whole) == 9 and whole == run("plain", cuda_graphs=False)
    shutil.rmtree(tmp_path / "graphs" / "checkpoints" / "step-00000008")
    assert run("graphs", resume=True) == whole  # from step 4 on, eagerly first


def test_no_memory_for_a_capture_is_told():
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))

    def loss(x):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return (weight * x).sum()

    graphed = Graphed(loss, [weight])
    for _ in range(EAGER):
        graphed(x=weight.detach())
    stream = torch.cuda.current_stream()
    with pytest.raises(HLAError, match="no memory .* --no-cuda-graphs"):
        graphed(x=weight.detach())
    assert torch.cuda.current_stream() == stream and float(weight.detach().sum()) == 3


def test_a_loss_that_waits_for_the_device_is_told():
    """In a process of its own, for what a broken capture leaves."""
    program = """
import torch
from hla.graphed import Graphed
weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
graphed = Graphed(lambda x: (weight * x).sum() * (weight.sum().item() > 0), [weight])
for _ in range(5):
    graphed(x=weight.detach())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "HLAError: a micro-batch cannot be captured as a CUDA graph" in done.stderr
    assert "--no-cuda-graphs trains without" in done.stderr
