"""What `hla.graphed` does around a capture: when it runs eagerly, what makes a graph, and what it refuses.

(Captures themselves: tests/gpu/test_graphed.py.)
"""

import dataclasses

import pytest
import torch

import hla
from hla.build import build_model, build_optimizer, recompute_activations
from hla.data import build_tokenizer, encode_documents
from hla.errors import HLAError
from hla.graphed import EAGER, GRAPHS, Graphed, GraphedTraining, Pool, _Captured, _refusal, with_empty_documents
from hla.train import train, train_step
from hla.train_config import TrainConfig, check_resumed, config_text, read_config
from tests.text_helpers import MICRO, documents, micro_config, write_corpus

BYTES = build_tokenizer("bytes", 0, [])
STREAM = encode_documents(BYTES, documents(9, words=20))
ROWS, PACKED = [(0, 40), (40, 40)], [(40 * i, 40) for i in range(5)]  # without and with borders of documents


class Pretended(Graphed):
    """As on a GPU: a replay is the function called once more, on the static inputs."""

    def __init__(self, *args):
        super().__init__(*args, pool=Pool(torch.device("cpu"), None, None))
        self._given = False  # a pool of its own
        self.happened = []

    def _beside(self, pool, inputs):
        self.happened.append("eager")
        return self.eager(**inputs)

    def _capture(self, pool, inputs):
        self.happened.append("capture")
        static = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        loss, writes = torch.zeros(()), self._cleared
        if writes:  # makes the gradients, or writes over them, which does not matter as it is done again
            self._run_for_graph(static)

        def replay():
            self.happened.append("replay")
            for p in self._parameters if writes else ():
                p.grad.zero_()
            loss.copy_(self._run(static))

        return _Captured(replay, {n: x for n, x in static.items() if isinstance(x, torch.Tensor)}, loss)


def micro_model(attention="hla", seed=0):
    options = {**MICRO, "num_hidden_layers": 2, "initializer_range": 0.2}
    return build_model(TrainConfig(attention=attention, model=options, seed=seed), BYTES).train()


def trained(steps, pretend=False, graphs=True, attention="hla", recompute=False):
    """(losses and norms, weights, what happened) of some steps of two micro-batches each."""
    model = micro_model(attention)
    if recompute:
        recompute_activations(model)
    graphed = GraphedTraining(model, torch.float32) if graphs else None
    if pretend:
        graphed.graphed = Pretended(graphed.graphed._loss, model.parameters())
    optimizer = build_optimizer(model, 1e-2, 0.1)
    numbers = [
        train_step(model, optimizer, [STREAM.pack(rows) for rows in step], clip=1.0, graphed=graphed) for step in steps
    ]
    return numbers, list(model.parameters()), graphed and getattr(graphed.graphed, "happened", None)


@pytest.mark.parametrize("pretend", [False, True])
@pytest.mark.parametrize("attention,recompute", [("hla", True), ("hla,softmax", False)])
def test_the_numbers_are_those_without(pretend, attention, recompute):
    steps = [[ROWS, PACKED], [ROWS, ROWS], [PACKED, ROWS]] * 2
    numbers, weights, happened = trained(steps, pretend, True, attention, recompute)
    expected, reference, _ = trained(steps, False, False, attention, recompute)
    if pretend and attention == "hla":  # (packed batches have another shape: empty documents, other sums)
        assert numbers == [pytest.approx(x, rel=1e-4) for x in expected]
    else:
        assert numbers == expected and all(map(torch.equal, weights, reference))
    if pretend:
        # By shape and by tokens of the step; the first micro-batch of a step writes the gradients, the second one adds.
        assert happened.count("capture") == 2 * (3 if attention == "hla" else 2)


def test_a_shape_runs_eagerly_before_it_is_captured():
    weight = torch.nn.Parameter(torch.ones(3))
    graphed = Pretended(lambda x, by: (weight * x).sum() / by, [weight])
    for call in range(5):
        assert graphed(x=torch.full((3,), float(call)), by=2) == pytest.approx(1.5 * call)
    assert graphed.happened == ["eager"] * EAGER + ["capture", *["replay"] * (5 - EAGER)]
    assert torch.equal(weight.grad, torch.full((3,), 5.0))  # the sum of all calls
    graphed.zero_grad()
    graphed.happened.clear()
    for by in (4, 2):  # another number is another graph
        graphed(x=torch.ones(3), by=by)
    graphed(x=torch.ones(3, dtype=torch.float64), by=2)
    assert graphed.happened == ["eager", "replay", "eager"]
    assert torch.equal(weight.grad, torch.full((3,), 0.25 + 0.5 + 0.5))


def test_shapes_beyond_the_bound_stay_eager():
    weight = torch.nn.Parameter(torch.ones(()))
    graphed = Pretended(lambda x: (weight * x).sum(), [weight])
    for size in range(1, GRAPHS + 3):
        for _ in range(EAGER + 2):
            graphed(x=torch.ones(size))
    assert graphed.happened.count("capture") == GRAPHS


def test_beyond_the_bound_a_shape_that_adds_adds_to_zeros(monkeypatch):
    monkeypatch.setattr("hla.graphed.GRAPHS", 1)
    weight = torch.nn.Parameter(torch.ones(3))
    graphed = Pretended(lambda x: (weight * x).sum(), [weight])
    for _ in range(EAGER + 1):
        graphed(x=torch.ones(3))
    graphed.zero_grad()
    graphed(x=torch.ones(3))
    assert graphed.happened[EAGER:] == ["capture", "replay", "replay"] and float(weight.grad[0]) == 1


@pytest.mark.parametrize("given", [False, True])
def test_the_first_call_after_clearing_writes_the_gradients(given):
    """The first graph that does makes them, unless they were there before; another one writes to the same place."""
    weight, unread = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    before = torch.full((3,), 7.0)
    if given:
        weight.grad = before
    graphed = Pretended(lambda x: (weight * x).sum() + (0 if len(x) == 3 else unread.sum()), [weight, unread])

    def after(*calls: torch.Tensor) -> list[float]:
        graphed.zero_grad()
        for x in calls:
            graphed(x=x)
        return [float(p.grad[0]) for p in (weight, unread)]

    vector, number = torch.full((3,), 2.0), torch.full((1,), 5.0)
    for _ in range(EAGER):
        assert after(vector) == [2, 0] and after(number) == [5, 1]
    graphed.happened.clear()
    assert after(vector) == [2, 0] and after(number) == [5, 1]
    assert graphed.happened == ["capture", "replay"] * 2
    held = weight.grad
    assert (held is before) == given
    for p in (weight, unread):
        p.grad.fill_(torch.nan)  # what is in them counts for nothing
    assert after(vector) == [2, 0] and after(number, vector) == [7, 1] and after(vector, vector) == [4, 0]
    assert graphed.happened.count("capture") == 3 and weight.grad is held
    graphed.zero_grad()
    assert weight.grad is None and unread.grad is None
    graphed.settle()
    assert weight.grad is held and not weight.grad.any() and not unread.grad.any()
    graphed(x=number)
    graphed.settle()
    assert float(weight.grad[0]) == 5


@pytest.mark.parametrize("calls", [1, EAGER + 2])
def test_what_another_backward_pass_adds_after_clearing_counts(calls):
    weight, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    graphed = Pretended(lambda x: (weight * x).sum() + other.sum(), [weight, other])
    for _ in range(calls):
        graphed.zero_grad()
        graphed(x=torch.ones(3))
    held = weight.grad
    graphed.zero_grad()
    (weight * 7).sum().backward()
    assert float(weight.grad[0]) == 7  # and not what was there before
    graphed(x=torch.ones(3))
    assert weight.grad is held or calls == 1
    assert (float(weight.grad[0]), float(other.grad[0])) == (8, 1)


def test_gradients_that_are_put_in_place_later_stay_there():
    weight = torch.nn.Parameter(torch.ones(3))
    graphed = Pretended(lambda x: (weight * x).sum(), [weight])
    flat = torch.zeros(6)
    weight.grad = flat[3:]
    for call in range(EAGER + 2):
        graphed.zero_grad()
        graphed(x=torch.full((3,), float(call)))
        assert flat.tolist() == [0] * 3 + [call] * 3
    assert graphed.happened.count("replay") == 2


def test_a_call_that_fails_leaves_gradients_cleared():
    weight = torch.nn.Parameter(torch.ones(3))
    graphed = Pretended(lambda x: (weight * x).sum(), [weight])
    for _ in range(EAGER + 1):
        graphed.zero_grad()
        graphed(x=torch.ones(3))
    graphed.zero_grad()
    (key,) = graphed._captured
    captured = graphed._captured[key]
    graphed._captured[key] = captured._replace(replay=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        graphed(x=torch.ones(3))
    graphed._captured[key] = captured
    graphed(x=torch.ones(3))
    assert float(weight.grad[0]) == 1


def test_gradients_and_weights_that_are_replaced_are_refused():
    model = micro_model()
    graphed = GraphedTraining(model, torch.float32)
    graphed.graphed = Pretended(graphed.graphed._loss, model.parameters())
    batch = STREAM.pack(ROWS)
    call = lambda: graphed(batch.inputs(torch.device("cpu")), batch.targets[0], 80)  # noqa: E731
    call()
    model.zero_grad(set_to_none=True)  # no graph knows of them yet
    for _ in range(EAGER + 1):
        call()
    model.zero_grad(set_to_none=False)
    call()
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    with pytest.raises(HLAError, match="must be changed in place"):
        call()
    model = micro_model()
    graphed = Pretended(lambda: model.lm_head.weight.sum(), model.parameters())
    for _ in range(EAGER + 1):
        graphed()
    model.zero_grad(set_to_none=True)
    with pytest.raises(HLAError, match=r"zero_grad\(set_to_none=False\)"):
        graphed()


@pytest.mark.parametrize("op", ["hla_q", "hla2"])
def test_empty_documents_change_no_bit_of_the_kernels(op):
    borders = torch.tensor([0, 3, 40, 70], dtype=torch.int32)
    padded = with_empty_documents(borders, 70)
    assert padded.tolist() == [0, 3, 40] + [70] * 14 and padded.dtype == torch.int32
    assert [with_empty_documents(torch.arange(n + 1), n).numel() - 1 for n in (16, 17, 64, 65)] == [16, 32, 64, 128]
    q, k, v = (torch.randn(1, 70, 1, 16).requires_grad_() for _ in range(3))
    g = (-torch.rand(1, 70, 1)).requires_grad_()
    results = []
    for cu in (borders, padded):
        o, _ = getattr(hla, op)(q, k, v, g=g, cu_seqlens=cu, backend="triton")
        results.append([o, *torch.autograd.grad(o, (q, k, v, g), torch.ones_like(o))])
    assert all(map(torch.equal, *results))


def test_documents_of_a_sequence_in_pieces_end_where_all_of_it_does():
    given = []
    graphed = GraphedTraining(micro_model(), torch.float32, pieces=3)
    graphed.graphed = lambda **inputs: given.append(inputs["cu_seq_lens_q"].tolist())
    graphed.graphed.pool = "one"
    borders = torch.tensor([0, 50, 90], dtype=torch.int32)
    graphed({"input_ids": torch.zeros(1, 30), "cu_seq_lens_q": borders}, torch.zeros(30), 90)
    assert given == [[0, 50] + [90] * 15]


def test_released_graphs_are_captured_again():
    weight = torch.nn.Parameter(torch.ones(3))
    graphed = Pretended(lambda x: (weight * x).sum(), [weight])
    for turn in (1, 2):
        for call in range(1, EAGER + 2):
            graphed(x=torch.ones(3))
            assert float(weight.grad[0]) == (turn - 1) * (EAGER + 1) + call
        assert graphed.happened.count("capture") == turn and graphed._captured
        graphed.release()
        assert not graphed._captured


def test_a_capture_that_fails_names_the_switch():
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    assert str(_refusal(error)) == (
        "a micro-batch cannot be captured as a CUDA graph (operation not permitted when stream is capturing): "
        "--no-cuda-graphs trains without"
    )
    assert "no memory" in str(_refusal(torch.OutOfMemoryError("CUDA out of memory"))) and "--no-cuda-graphs" in str(
        _refusal(torch.OutOfMemoryError("CUDA out of memory"))
    )


# ------------------------------------------------------------------------------------------------------ the setting


def test_when_graphs_are_used(monkeypatch):
    assert TrainConfig().captures("cuda") and not TrainConfig().captures("cpu")
    assert not TrainConfig(compile=True).captures("cuda") and not TrainConfig(cuda_graphs=False).captures("cuda")
    assert TrainConfig(cuda_graphs=True).captures("cuda") and not TrainConfig(cuda_graphs=True).captures("cpu")
    monkeypatch.setenv("HLA_CHECK", "1")
    assert not TrainConfig().captures("cuda") and TrainConfig(cuda_graphs=True).captures("cuda")
    with pytest.raises(HLAError, match="compile and cuda_graphs exclude each other"):
        TrainConfig(compile=True, cuda_graphs=True)


def test_several_ranks_have_them_where_each_has_the_whole_model():
    for setting in (None, False, True):
        assert TrainConfig(cuda_graphs=setting).mesh(2) == (2, 1, 1)
        assert TrainConfig(cuda_graphs=setting, sp=2).mesh(2) == (1, 2, 1)
    for settings in ({"tp": 2}, {"shard": True}):
        with pytest.raises(HLAError, match="cuda_graphs needs the whole model on each GPU: no tp, no --shard"):
            TrainConfig(cuda_graphs=True, **settings).mesh(2)


@pytest.mark.parametrize("setting", [None, True, False])
def test_the_setting_is_saved_and_may_change(setting, tmp_path):
    config = TrainConfig(cuda_graphs=setting)
    (tmp_path / "train.toml").write_text(config_text(config))
    saved = TrainConfig(**read_config(tmp_path / "train.toml"))
    assert saved == config
    for other in (None, True, False):
        check_resumed(dataclasses.replace(config, cuda_graphs=other), saved)


def test_a_run_on_a_cpu_takes_no_notice(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", count=6, words=60)
    losses = []
    for name, setting in (("asked", True), ("plain", None)):
        result = train(micro_config(corpus, tmp_path / name, steps=2, cuda_graphs=setting))
        losses.append(result.evaluation.loss)
    assert losses[0] == losses[1]
    result = train(micro_config(corpus, tmp_path / "asked", steps=3, cuda_graphs=True, resume=True))
    assert result.steps == 3
