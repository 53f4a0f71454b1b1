"""What keeps a run from going wrong unseen: layers measured, steps skipped; and what keeps it within its memory."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hla.loss
import hla.train
from hla.build import build_model, build_optimizer, recompute_activations
from hla.data import build_tokenizer, encode_documents
from hla.errors import HLAError
from hla.loss import summed_cross_entropy
from hla.signals import stop_signals
from hla.telemetry import Watch, layer_values, measure
from hla.train import train, train_step
from hla.train_config import TrainConfig
from hla.training_state import checkpoints, read_state
from tests.text_helpers import MICRO, documents, micro_config, write_corpus

BYTES = build_tokenizer("bytes", 0, [])
STREAM = encode_documents(BYTES, documents(2))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), count=6, words=60)


def micro_model(**settings: object) -> torch.nn.Module:
    options = {**MICRO, "num_hidden_layers": 2, "initializer_range": 0.2, **settings}
    return build_model(TrainConfig(attention="hla,softmax", model=options), BYTES)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("rows", [2, 5], ids=["rows", "packed"])
def test_measured_are_the_states_and_outputs_themselves(rows):
    model = micro_model().train()
    stream = encode_documents(BYTES, documents(9, words=20))
    batch = stream.pack([(40 * i, 40) for i in range(rows)])
    packed = "cu_seq_lens_q" in batch.inputs(torch.device("cpu"))
    assert packed == (rows == 5)
    values = measure(model, batch, torch.float32)
    assert model.training and not any(m._forward_hooks for m in model.modules())

    cu = batch.cu_seqlens if packed else torch.arange(0, 40 * rows + 1, 40)
    x = model.model.embed_tokens(batch.input_ids)
    block = model.model.layers[0]
    mixed, state = block.mixer(block.input_layernorm(x), cu_seqlens=cu, output_state=True)
    x = x + mixed
    x = x + block.mlp(block.post_attention_layernorm(x))
    logits = model(input_ids=batch.input_ids, cu_seq_lens_q=cu).logits
    expected = {"layer0/output": mixed, "layer0/stream": x, "logits": logits} | {
        f"layer0/state_{name}": part for name, part in state.op._asdict().items()
    }
    assert set(values) == set(expected) | {"layer1/output", "layer1/stream"} and "layer0/state_S" in values
    for name, tensor in expected.items():
        assert values[name] == pytest.approx(tensor.abs().max().item(), rel=1e-4), name


def test_growth_is_told_against_what_was_usual():
    watch = Watch({"a": 1.0, "b": 1.0} for _ in range(3))
    assert watch.grown({"a": 9.0, "b": 11.0}) == ["b"]
    assert watch.grown({"a": math.nan, "b": math.inf}) == ["a", "b"]
    assert Watch().grown({"a": 1e9}) == []  # nothing to compare with
    slow = Watch()
    assert not any(slow.grown({"a": 1.1**i}) for i in range(200))  # what grows slowly is not sudden


def test_a_run_warns_of_a_layer_before_the_loss_is_nan(corpus, tmp_path, monkeypatch, capsys):
    real = hla.train.train_step
    calls = iter(range(100))

    def unstable(model, *args, **options):
        if next(calls) >= 8:
            with torch.no_grad():
                model.model.layers[0].mixer.o_proj.weight.mul_(8)
        return real(model, *args, **options)

    monkeypatch.setattr(hla.train, "train_step", unstable)
    train(micro_config(corpus, tmp_path / "run", steps=10, telemetry_every=2))
    told = capsys.readouterr().err.replace("\n", " ")
    assert "at step 10 much larger than before: layer0/output = " in told and "at step 8" not in told
    layers = [r for r in records(tmp_path / "run") if layer_values(r)]
    assert [r["step"] for r in layers] == [1, 2, 4, 6, 8, 10]
    assert layers[-1]["layer0/output"] > 10 * layers[-2]["layer0/output"]


# ------------------------------------------------------------------------------------------------------ skipped steps


def broken_at(monkeypatch, steps: set[int]) -> None:
    """Let the gradient of one parameter be NaN in these steps, counted from 1."""
    real = hla.train.train_step
    count = [0]

    def step(model, *args, **options):
        count[0] += 1
        handle = model.model.norm.weight.register_hook(lambda g: g * math.nan if count[0] in steps else g)
        try:
            return real(model, *args, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(hla.train, "train_step", step)


def test_steps_that_are_not_finite_are_skipped_and_counted(corpus, tmp_path, monkeypatch):
    broken_at(monkeypatch, {2, 3, 5})
    result = train(micro_config(corpus, tmp_path / "run", steps=6, max_skipped=3))
    assert result.steps == 6 and result.tokens == 3 * 64
    assert [r["step"] for r in records(result.folder) if "loss" in r] == [1, 4, 6]
    assert [(r["step"], r["skipped"]) for r in records(result.folder) if "skipped" in r] == [(2, 1), (3, 2), (5, 3)]
    assert json.loads((result.folder / "training.json").read_text())["skipped"] == 3
    assert result.evaluation is not None and math.isfinite(result.evaluation.loss)


def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    broken_at(monkeypatch, {2, 6, 7, 8})
    sentence = r"step 8 the loss is .* gradient norm nan, .* in a row .*: 3; .* The model of step 4 is in"
    with pytest.raises(HLAError, match=sentence):
        train(micro_config(corpus, tmp_path / "run", steps=20, save_every=4, max_skipped=3))
    assert [read_state(p)["step"] for p in checkpoints(tmp_path / "run")] == [4]
    monkeypatch.undo()
    result = train(micro_config(corpus, tmp_path / "run", steps=9, lr=1e-4, resume=True))  # with a smaller rate
    assert result.steps == 9 and [r["step"] for r in records(result.folder) if "skipped" in r] == [2]


# ------------------------------------------------------------------------------------------------------ memory, speed


def test_the_loss_in_pieces_is_the_loss(monkeypatch):
    head = torch.nn.Linear(16, 1000, bias=False)
    targets = torch.randint(1000, (333,))
    largest = []
    real = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, *a, **k: largest.append(x.numel()) or real(x, *a, **k))

    def run(limit: int) -> list[torch.Tensor]:
        monkeypatch.setattr(hla.loss, "LOGITS_BYTES", limit)
        hidden = torch.randn(333, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        head.weight.grad = None
        loss = summed_cross_entropy(hidden, head, targets)
        loss.backward()
        return [loss.detach(), hidden.grad, head.weight.grad]

    whole = run(1 << 30)
    assert max(largest) == 333_000
    largest.clear()
    pieces = run(400_000)
    assert max(largest) == 100_000
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_recomputing_keeps_fewer_activations_and_gives_the_same_gradient():
    batch = STREAM.pack([(0, 120)])
    kept, gradients = [], []
    for recompute in (False, True):
        model = micro_model(num_hidden_layers=6)
        if recompute:
            recompute_activations(model)
        size = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += x.numel() if not isinstance(x, torch.nn.Parameter) else 0
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = model.train().model(**batch.inputs(torch.device("cpu")), use_cache=False).last_hidden_state
        kept.append(size)
        summed_cross_entropy(hidden.flatten(0, 1), model.lm_head, batch.targets[0]).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < kept[0] / 5
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("option", ["recompute", "compile"])
def test_options_for_memory_and_speed_train_the_same_model(option, corpus, tmp_path, monkeypatch):
    """The compiler's back end needs half a minute here; what is before it is what can go wrong."""
    used = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: used.append("compile") or real(self, backend="eager"))
    enable = hla.train.recompute_activations
    monkeypatch.setattr(hla.train, "recompute_activations", lambda model: used.append("recompute") or enable(model))
    options = {"steps": 3, "save_every": 2, "telemetry_every": 2, "lr": 1e-2}
    train(micro_config(corpus, tmp_path / "plain", **options))
    assert used == []
    train(micro_config(corpus, tmp_path / "other", **options, **{option: True}))
    assert used == [option]
    plain, other = ([r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("plain", "other"))
    assert other == pytest.approx(plain, rel=1e-4)
    names = [sorted(p.name for p in checkpoints(tmp_path / name)) for name in ("plain", "other")]
    assert names[0] == names[1]


# ------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(number):
    class Ended(Exception):
        pass

    def end(number, frame):
        raise Ended

    before = signal.signal(number, end)
    try:
        with pytest.raises(Ended), stop_signals() as stop:
            assert stop() is None
            signal.raise_signal(number)
            assert stop() == number
            signal.raise_signal(number)
        with stop_signals():
            pass
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)


def test_a_step_is_taken_on_the_mean_over_all_tokens():
    """The loss in train_step is that of the model's own forward pass."""
    model = micro_model()
    batch = STREAM.pack([(0, 50)])
    loss, _ = train_step(model, build_optimizer(model, 0.0, 0.0), [batch], clip=1.0)
    logits = model(input_ids=batch.input_ids, cu_seq_lens_q=batch.cu_seqlens).logits[0]
    assert loss == pytest.approx(F.cross_entropy(logits, batch.targets[0]).item(), rel=1e-5)
