import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hla.checkpoint
import hla.train
from hla.build import build_model, build_optimizer, layer_types, learning_rate
from hla.checkpoint import load_model, save_model
from hla.data import Document, TokenStream, build_tokenizer, encode_documents, read_documents, token_bytes
from hla.errors import HLAError
from hla.evaluate import evaluate, windows
from hla.sources import prepare, step_batches
from hla.train import train, train_step
from hla.train_config import TrainConfig
from tests.text_helpers import MICRO, MICRO_OPTIONS, documents, micro_config, write_corpus

BYTES = build_tokenizer("bytes", 0, [])
SIZES = [len(text) for text in token_bytes(BYTES)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def micro_model(attention: str = "hla", **model: object) -> torch.nn.Module:
    return build_model(TrainConfig(attention=attention, model={**MICRO, **model}), BYTES)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ------------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("attention", ["hla", "softmax", "hla,softmax"])
def test_packed_loss_is_the_loss_of_the_documents_one_by_one(attention):
    model = micro_model(attention, num_hidden_layers=2, initializer_range=0.3)
    stream = encode_documents(BYTES, [Document("", text) for text in ("first document", "é", "the third one!")])
    ends = [*stream.starts[1:].tolist(), len(stream)]
    packed = stream.pack([(0, len(stream))])
    assert "cu_seq_lens_q" in packed.inputs(torch.device("cpu"))
    singles = [stream.pack([(s, e - s)]) for s, e in zip(stream.starts.tolist(), ends, strict=True)]

    def loss(*batches) -> float:  # train_step's own loss; a rate of zero leaves the weights alone
        return train_step(model, build_optimizer(model, lr=0.0, weight_decay=0.0), batches, clip=1.0)[0]

    assert loss(packed) == pytest.approx(loss(*singles), rel=1e-5)
    without_borders = packed._replace(cu_seqlens=packed.cu_seqlens[[0, -1]])
    assert abs(loss(without_borders) - loss(packed)) > 1e-3  # or this test could not tell


def test_rows_of_one_length_need_no_packing():
    model = micro_model(initializer_range=0.3)
    stream = TokenStream(np.random.default_rng(0).integers(0, 256, 200), np.array([0]))
    batch = stream.batch(0, 0, rows=3, context=16)
    inputs = batch.inputs(torch.device("cpu"))
    assert inputs["input_ids"].shape == (3, 16) and "cu_seq_lens_q" not in inputs
    plain = model(**inputs).logits.flatten(0, 1)
    packed = model(input_ids=batch.input_ids, cu_seq_lens_q=batch.cu_seqlens).logits[0]
    torch.testing.assert_close(plain, packed, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ evaluation


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    context=st.integers(1, 20),
    data=st.data(),
)
@settings(deadline=None)
def test_windows_score_every_token_once_inside_its_document(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    starts = np.cumsum([0, *lengths])
    stream = TokenStream(np.zeros(starts[-1] + 1), starts[:-1])
    scored: list[int] = []
    for start, length, skip in windows(stream, context, stride):
        document = np.searchsorted(starts, start, "right")
        assert 0 < length <= context and start + length <= starts[document]
        assert start in starts or skip >= min(context - stride, length)  # so much context at least
        scored += range(start + skip, start + length)
    assert sorted(scored) == list(range(len(stream)))


class Uniform(torch.nn.Module):
    """Predicts every id equally."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids: torch.Tensor, use_cache: bool, cu_seq_lens_q: torch.Tensor | None = None):
        return SimpleNamespace(logits=self.nothing.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(kind):
    texts = [Document("", "é世🙂 and so on. "), *documents(5)]
    tokenizer = build_tokenizer(kind, 300, texts)
    stream = encode_documents(tokenizer, texts)
    result = evaluate(Uniform(len(tokenizer)), stream, [len(t) for t in token_bytes(tokenizer)], context=17, rows=3)
    size = sum(d.size for d in texts)
    assert (result.tokens, result.bytes) == (len(stream), size)
    assert result.bits_per_byte == pytest.approx(math.log2(len(tokenizer)) * len(stream) / size, rel=1e-6)
    assert result.perplexity == pytest.approx(len(tokenizer), rel=1e-5)


@pytest.mark.parametrize("attention", ["hla", "softmax"])
def test_evaluation_in_one_window_is_the_loss_of_whole_documents(attention):
    model = micro_model(attention, initializer_range=0.3)
    texts = documents(3, words=10)
    total = 0.0
    for document in texts:
        ids = torch.tensor([[256, *document.text.encode(), 256]])
        logits = model(input_ids=ids[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    stream = encode_documents(BYTES, texts)
    model.train()
    assert evaluate(model, stream, SIZES, context=1000).nats == pytest.approx(total, rel=1e-5)
    assert model.training
    assert evaluate(model, stream, SIZES, context=8).nats != pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ the parts


def test_weight_decay_is_on_matrices_only():
    model = micro_model()
    decay = {id(p): g["weight_decay"] for g in build_optimizer(model, 1e-3, 0.5).param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    matrices = ("proj.weight", "embed_tokens.weight")
    for name, parameter in model.named_parameters():
        assert (decay[id(parameter)] == 0.5) == name.endswith(matrices), name
    assert {0.0, 0.5} == set(decay.values())


def test_the_rate_warms_up_then_falls_to_a_tenth():
    rates = [learning_rate(2.0, i / 1000, i, 0.1) for i in range(1001)]
    top = rates.index(max(rates))
    assert 95 <= top <= 105 and 1.9 < max(rates) <= 2.0
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[50] == pytest.approx(rates[100] / 2, rel=0.03)
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate(2.0, 0.0, 4, 10) == pytest.approx(1.0)  # a warm-up in steps: 5 of 10


def test_accumulated_micro_batches_are_one_large_batch(corpus, tmp_path):
    config = micro_config(corpus, tmp_path)
    stream = prepare(config).train
    pieces = [(0, 20), (40, 32), (90, 7)]
    after = []
    for batches in ([stream.pack(pieces)], [stream.pack([piece]) for piece in pieces]):
        model = micro_model(initializer_range=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = train_step(model, optimizer, batches, clip=100.0)
        after.append((result, weights(model)))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-4)
    for one, other in zip(after[0][1], after[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_step():
    model = micro_model(initializer_range=0.1)
    before = weights(model)
    batch = TokenStream(np.arange(60) % 7, np.array([0])).pack([(0, 40)])
    _, norm = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [batch], clip=0.01)
    moved = math.sqrt(sum(((a - b) ** 2).sum().item() for a, b in zip(before, weights(model), strict=True)))
    assert norm > 0.02 and moved == pytest.approx(0.01, rel=1e-2)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    model = micro_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = math.inf
    before = weights(model)
    batch = TokenStream(np.full(20, 3), np.array([0])).pack([(0, 10)])
    loss, _ = train_step(model, build_optimizer(model, 1e-2, 0.1), [batch], clip=1.0)
    assert not math.isfinite(loss)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_steps_walk_through_all_epochs(corpus, tmp_path):
    config = micro_config(corpus, tmp_path, accumulate=3)
    stream = prepare(config).train
    per_epoch = stream.steps_per_epoch(config.batch_size, config.context)
    walked = [b.input_ids for step in range(per_epoch) for b in step_batches(stream, config, step)]
    expected = [
        stream.batch(epoch, step, rows=config.batch_size, context=config.context, seed=config.seed).input_ids
        for epoch in range(3)
        for step in range(per_epoch)
    ]
    assert len(walked) == len(expected) and all(map(torch.equal, walked, expected))


def test_patterns_of_layers():
    linear, full = "linear_attention", "full_attention"
    assert layer_types("hla,hla,softmax", 5) == [linear, linear, full, linear, linear]
    assert micro_model("softmax").config.layer_types == [full]
    with pytest.raises(HLAError, match="unknown attention"):
        layer_types("hla,window", 4)


# ------------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(micro_config(corpus, out, steps=60, lr=1e-2, eval_every=20, save_every=25))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_on_held_out_text(run):
    validation = [r["val_loss"] for r in records(run.folder) if "val_loss" in r]
    assert len(validation) == 3
    first = next(r["loss"] for r in records(run.folder) if "loss" in r)
    assert first == pytest.approx(math.log(257), abs=0.3)
    assert validation[-1] < validation[0] < first and validation[-1] < 2.7


def test_a_run_leaves_a_folder_that_says_everything(run, corpus):
    names = {p.name for p in run.folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    shown = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert shown == [(r["step"], pytest.approx(r["loss"])) for r in records(run.folder) if "loss" in r]
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in run.folder.parent.iterdir() if p != run.folder]  # nothing half written beside it
    steps = [r for r in records(run.folder) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert all(r["tokens"] == 64 * r["step"] and r["grad_norm"] > 0 for r in steps[:10])
    training = json.loads((run.folder / "training.json").read_text())
    assert training["config"]["data"] == [str(corpus)] and training["steps"] == run.steps == 60
    assert training["evaluation"] == run.evaluation.as_dict()
    assert run.evaluation.bytes == training["held_out"]["bytes"]


def test_the_saved_model_is_the_trained_one(run):
    model, tokenizer, training = load_model(run.folder)
    held_out = prepare(TrainConfig(**{**training["config"], "data": tuple(training["config"]["data"])})).held_out
    again = evaluate(model, held_out, [len(t) for t in token_bytes(tokenizer)], context=32)
    assert again.nats == pytest.approx(run.evaluation.nats, rel=1e-6)


def test_runs_repeat_to_the_bit(corpus, tmp_path):
    losses = []
    for name in ("one", "two"):
        train(micro_config(corpus, tmp_path / name, tokenizer="bpe", vocab_size=300, steps=5))
        losses.append([r["loss"] for r in records(tmp_path / name) if "loss" in r])
    assert losses[0] == losses[1]


def test_a_time_budget_ends_the_run_with_the_schedule(corpus, tmp_path, monkeypatch):
    clock = iter(range(1, 10**9))
    monkeypatch.setattr(hla.train, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), time=time.time))
    result = train(micro_config(corpus, tmp_path / "run", steps=None, minutes=2.0, lr=1.0e-3, warmup=0.1))
    rates = [r["lr"] for r in records(result.folder) if "lr" in r]
    assert 5 < result.steps < 120  # a made-up clock: one second goes by at every look
    assert max(rates) > 0.8e-3 and rates[-1] < 0.2e-3


def test_an_earlier_run_is_only_replaced_when_asked_to(corpus, tmp_path):
    out = tmp_path / "run"
    train(micro_config(corpus, out, steps=2))
    with pytest.raises(HLAError, match="--overwrite"):
        train(micro_config(corpus, out, steps=1))
    assert load_model(out)[2]["steps"] == 2
    train(micro_config(corpus, out, steps=1, overwrite=True))
    assert load_model(out)[2]["steps"] == 1 and {r["step"] for r in records(out)} == {1}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(HLAError, match="other files"):
        train(micro_config(corpus, other, overwrite=True))
    assert (other / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_model_and_says_where(number, corpus, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "hla.cli", "train", str(corpus), "--out", str(out), "--tokenizer", "bytes"]
    command += ["--context", "32", "--batch-size", "2", "--steps", "100000", "--device", "cpu", *MICRO_OPTIONS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"Stopped by {number.name}: the model is in '{out}'" in errors and "Traceback" not in errors
    assert load_model(out)[2]["steps"] == records(out)[-1]["step"] > 3


# ------------------------------------------------------------------------------------------------------ saving


@pytest.fixture
def saved(tmp_path):
    """A model folder with logs, and a function that tells which model is in it now."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    save_model(folder, micro_model(), BYTES, {"version": "old"})

    def version() -> str:
        model, _, training = load_model(folder)
        assert (model.config.hidden_size == 48) == (training["version"] == "new")
        return training["version"]

    return folder, version


NEW = """
import os, signal, sys, torch
import hla.checkpoint
from tests.test_train import BYTES, micro_model
calls, name = int(sys.argv[2]), sys.argv[3]
real = getattr(hla.checkpoint, name)
def dying(*args):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(hla.checkpoint, name, dying)
hla.checkpoint.save_model(hla.checkpoint.Path(sys.argv[1]), micro_model(hidden_size=48), BYTES, {"version": "new"})
"""


@pytest.mark.parametrize("at, name", [(0, "flush"), (3, "flush"), (0, "_exchange")])
def test_a_kill_while_saving_leaves_the_old_model(at, name, saved):
    folder, version = saved
    code = subprocess.run([sys.executable, "-c", NEW, str(folder), str(at), name], cwd=Path(__file__).parents[1])
    assert code.returncode == -signal.SIGKILL
    assert version() == "old"
    save_model(folder, micro_model(hidden_size=48), BYTES, {"version": "new"})  # what the kill left is no hindrance
    assert version() == "new" and (folder / "metrics.jsonl").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("exchange", ["in one step", "in three"])
def test_a_folder_that_is_replaced_keeps_its_logs(exchange, saved, monkeypatch):
    folder, version = saved
    (folder / "stale.bin").write_text("of the old model")
    if exchange == "in three":
        monkeypatch.setattr(hla.checkpoint.ctypes, "CDLL", lambda name: SimpleNamespace())
    save_model(folder, micro_model(hidden_size=48), BYTES, {"version": "new"})
    assert version() == "new"
    assert (folder / "metrics.jsonl").read_text() == "{}\n" and not (folder / "stale.bin").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model_and_nothing_else(saved):
    """A limit on the size of files stands in for a full disk: safetensors itself fails while it writes."""
    folder, version = saved
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(HLAError, match="cannot save the model"):
            save_model(folder, micro_model(hidden_size=48), BYTES, {"version": "new"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert version() == "old"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_what_is_read_for_training_can_be_found_again(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(corpus)
    result = train(micro_config(Path("*.txt"), tmp_path / "run", steps=1))
    monkeypatch.chdir(os.sep)
    (source,) = load_model(result.folder)[2]["config"]["data"]
    assert len(read_documents([source])) == 12
