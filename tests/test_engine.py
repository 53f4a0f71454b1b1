"""The engine: every request gets what it gets alone, none is lost, and memory stays what it was at the start."""

import gc
import random
import re
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import hla.generate
from hla.engine import Engine, Request, sample_rows
from hla.errors import HLAError
from hla.generate import sample, stream
from hla.layer_state import state_tensors
from hla.models import HLACache, HLAConfig, HLAForCausalLM
from tests.text_helpers import MICRO

VOCAB = 257


def make_model(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    config = HLAConfig(**{**MICRO, "num_hidden_layers": 2, "vocab_size": VOCAB, "initializer_range": 0.5, **options})
    return HLAForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompts(count, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def record_logits(engine: Engine, request: Request) -> list[torch.Tensor]:
    """The rows of logits of one request, as the engine sees them."""
    decode, rows = engine._decode, []

    def recording():
        logits = decode()
        if request in engine._slots and request.status == "running":
            rows.append(logits[engine._slots.index(request)].clone())
        return logits

    engine._decode = recording
    return rows


OPTIONS = {
    "default": {},
    "rope, hla2": {"op": "hla2", "use_rope": True, "num_key_value_heads": 1},
    "hla3, no convolution": {"op": "hla3", "conv_size": 0, "decay": "fixed"},
    "normalized": {"op": "hla2", "normalize": True, "p": "q", "ridge": 0.0, "gain": 1.0, "feature_map": "elu1"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_mixed_lengths_get_the_tokens_that_each_gets_alone(options):
    model = make_model(torch.float64, **options)
    engine, rng = Engine(model, slots=5, prefill_chunk=16), random.Random(1)
    asked = [(ids, rng.randint(1, 20)) for ids in prompts(25, longest=70)]
    requests = [engine.submit(ids, max_tokens=n, temperature=0) for ids, n in asked]
    engine.run()
    for (ids, n), request in zip(asked, requests, strict=True):
        assert request.tokens == list(stream(model, ids, max_tokens=n, temperature=0))
    assert len({token for request in requests for token in request.tokens}) > 20


def test_tokens_are_those_of_streaming_in_float32_too(model):
    engine = Engine(model, slots=16, prefill_chunk=32)
    asked = prompts(50, longest=100, seed=3)
    requests = [engine.submit(ids, max_tokens=12, temperature=0) for ids in asked]
    engine.run()
    for ids, request in zip(asked, requests, strict=True):
        assert request.tokens == list(stream(model, ids, max_tokens=12, temperature=0))


@pytest.mark.parametrize("slots,slot", [(5, 0), (5, 2), (5, 4), (16, 9)])
def test_company_changes_no_bit_of_the_logits(model, slots, slot):
    ids = prompts(1, longest=1, seed=5)[0] * 50

    def logits(company: bool):
        engine = Engine(model, slots=slots, prefill_chunk=16)
        first = [7, 8, 9, 9] if company else [7, 8]
        before = [engine.submit(first, max_tokens=1000, seed=i) for i in range(slot)]  # they take the slots before
        request = engine.submit(ids, max_tokens=20, temperature=0)
        rows = record_logits(engine, request)
        while request.status != "running":
            engine.step()
        assert engine._slots.index(request) == slot
        others = prompts(30, longest=40, seed=6)
        if company:
            for i, other in enumerate(others):
                engine.submit(other, max_tokens=1 + i % 7, seed=i)
        for i, other in enumerate(before):
            if not company or i % 2:
                engine.cancel(other)
        for _ in engine.stream(request):
            pass
        assert company == any(other is not None for other in engine._slots)
        return request.tokens, torch.stack(rows)

    (tokens, alone), (same_tokens, together) = logits(False), logits(True)
    assert len(tokens) == len(alone) == 20 and tokens == same_tokens
    assert torch.equal(alone, together)


def test_what_a_free_slot_holds_disturbs_nobody(model):
    first, second = prompts(2, longest=50, seed=8)
    alone = [list(stream(model, ids, max_tokens=10, temperature=0)) for ids in (first, second)]
    engine = Engine(model, slots=2)
    request = engine.submit(first, max_tokens=10, temperature=0)
    engine.step()
    for layer in engine._states.layers:
        for x in state_tensors(layer.state):
            x[1] = float("nan")
    for _ in range(3):
        engine.step()
    later = engine.submit(second, max_tokens=10, temperature=0)  # it gets the slot full of NaN
    engine.run()
    assert [request.tokens, later.tokens] == alone


def test_a_long_prompt_does_not_hold_up_running_requests(model):
    engine = Engine(model, slots=8, prefill_chunk=16)
    running = engine.submit([1, 2], max_tokens=50, temperature=0)
    engine.step()
    (long,), sizes = [[3] * 101], []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        request = engine.submit(long, max_tokens=1, temperature=0)
        short = [engine.submit(ids, max_tokens=5, temperature=0) for ids in ([1] * 5, [2] * 6, [3], [4] * 9)]
        for i in range(6):
            assert [r for r, _ in engine.step()] == [running]  # a token in every step
            assert request.status == "prefilling" and request._prefilled == 16 * (i + 1)
            assert {r.status for r in short} == {"waiting"}
        engine.step()  # 4 tokens are left of the long one (its last belongs to decoding); 4 and 5 follow, then 0
        assert [r.status for r in (request, *short)] == ["finished", "running", "running", "running", "prefilling"]
        assert sizes == 6 * [(1, 16), (8, 1)] + [(1, 4), (1, 4), (1, 5), (8, 1)]
        engine.step()
        assert short[-1].status == "running" and len(running.tokens) == 9
    finally:
        hook.remove()


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.5, "temperature": 2.0}])
def test_what_a_seed_draws_does_not_depend_on_the_company(model, options):
    asked = prompts(20, longest=30, seed=9)

    def draw(order, slots):
        engine = Engine(model, slots=slots, prefill_chunk=8)
        requests = {}
        for i in order:
            requests[i] = engine.submit(asked[i], max_tokens=10, seed=i, **options)
            engine.submit([i], max_tokens=3, temperature=0)
        engine.run()
        return [requests[i].tokens for i in range(len(asked))]

    one = draw(range(20), 16)
    assert one == draw(random.Random(0).sample(range(20), 20), 16) == draw(range(20), 3)
    engine = Engine(model)
    assert one[0] != list(engine.stream(engine.submit(asked[0], max_tokens=10, seed=77, **options)))


def test_greedy_and_drawn_requests_share_a_batch(model):
    ids = prompts(8, longest=20, seed=10)
    engine = Engine(model, slots=8)
    greedy = [engine.submit(x, max_tokens=10, temperature=0) for x in ids[:4]]
    narrow = [engine.submit(x, max_tokens=10, top_k=1) for x in ids[4:6]]
    narrow += [engine.submit(x, max_tokens=10, top_p=1e-6) for x in ids[6:]]
    engine.submit([1], max_tokens=10, seed=1)
    engine.run()
    for x, request in zip(ids, greedy + narrow, strict=True):
        assert request.tokens == list(stream(model, x, max_tokens=10, temperature=0))


def test_rows_are_drawn_with_the_frequencies_of_the_other_sampler():
    rows = 20_000
    logits = torch.tensor([0.0, 2.0, 1.0, -2.0, -1.0])
    settings = [(1.0, None, None), (2.0, None, None), (1.0, 3, None), (1.0, None, 0.8), (0.7, 4, 0.9), (1.0, 1, 0.1)]
    uniform = 1 - torch.rand(rows, generator=torch.Generator().manual_seed(0))
    for temperature, top_k, top_p in settings:
        parts = torch.tensor([temperature, top_k or 5, top_p or 1.0])[:, None].expand(3, rows)
        drawn = sample_rows(logits.expand(rows, 5), *parts, uniform)
        expected = sample(logits.expand(rows, 5), temperature, top_k, top_p, torch.Generator().manual_seed(1))
        shares, expected_shares = (x.bincount(minlength=5) / rows for x in (drawn, expected))
        torch.testing.assert_close(shares, expected_shares, atol=0.015, rtol=0)
        assert ((shares == 0) == (expected_shares == 0)).all()
    ends = sample_rows(logits.expand(2, 5), *torch.tensor([[1.0] * 2, [5] * 2, [1.0] * 2, [1e-30, 1.0]]))
    assert ends.tolist() == [1, 3]  # the likeliest and the least likely id
    assert sample_rows(logits.expand(1, 5), *torch.zeros(4, 1)).tolist() == [1]


def test_a_saved_prompt_is_where_requests_go_on(tmp_path):
    model = make_model(torch.float64)
    system, *questions = prompts(6, longest=60, seed=11)
    with torch.inference_mode():
        cache = model(torch.tensor([system])).past_key_values
    tensors = [x for layer in cache.layers for x in state_tensors(layer.state)]
    saved = [x.clone() for x in tensors]
    cache.save(tmp_path / "system.state", model)
    for held in (cache, HLACache.load(tmp_path / "system.state")):
        engine = Engine(model, slots=3, prefill_chunk=8)
        requests = [engine.submit(ids, max_tokens=8, temperature=0, cache=held) for ids in questions]
        plain = engine.submit(questions[0], max_tokens=8, temperature=0)
        engine.run()
        for ids, request in zip(questions, requests, strict=True):
            assert request.tokens == list(stream(model, system + ids, max_tokens=8, temperature=0))
        assert plain.tokens == list(stream(model, questions[0], max_tokens=8, temperature=0)) != requests[0].tokens
    assert all(torch.equal(x, y) for x, y in zip(saved, tensors, strict=True))
    with pytest.raises(HLAError, match="model"):
        held = HLACache.load(tmp_path / "system.state")
        Engine(make_model(torch.float64, seed=1)).submit([1], max_tokens=1, cache=held)


def test_requests_end_at_a_stop_id_or_at_their_length(model):
    (expected,) = [list(stream(model, [1, 2], max_tokens=30, temperature=0))]
    end = expected[5]
    until = expected[: expected.index(end) + 1]
    engine = Engine(model, slots=4)
    go_on, stop, exact, ends = [
        engine.submit([1, 2], max_tokens=n, temperature=0, stop_ids=ids)
        for n, ids in ((30, None), (30, [0, end]), (len(until), {end}), (30, ()))
    ]
    engine.run()
    assert (go_on.tokens, go_on.finish_reason) == (ends.tokens, ends.finish_reason) == (expected, "length")
    assert (stop.tokens, stop.finish_reason) == (exact.tokens, exact.finish_reason) == (until, "eos")
    for configured in (end, [VOCAB - 1, end]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.config, "eos_token_id", configured)
            request = engine.submit([1, 2], max_tokens=30, temperature=0)
            ignoring = engine.submit([1, 2], max_tokens=30, temperature=0, stop_ids=())
        engine.run()
        assert (request.tokens, request.finish_reason, request.status) == (until, "eos", "finished")
        assert ignoring.tokens == expected


def test_tokens_come_as_they_are_decoded_and_requests_may_come_meanwhile(model):
    engine = Engine(model, slots=2)
    first = engine.submit(torch.tensor([5, 6]), max_tokens=4, temperature=0)
    late, seen = None, {}
    for request, token in engine:
        seen.setdefault(request, []).append(token)
        assert request.tokens[-1] == token
        if request is first and len(first.tokens) == 2:
            late = engine.submit([9], max_tokens=3, temperature=0)
    assert seen == {first: first.tokens, late: late.tokens}
    assert engine.idle and engine.step() == [] and (first.id, late.id) == (0, 1)
    one, other = (engine.submit([x], max_tokens=5, temperature=0) for x in (1, 2))
    tokens = engine.stream(one)
    assert next(tokens) == one.tokens[0] and len(other.tokens) == 1 and not one.done
    assert [one.tokens[0], *tokens] == one.tokens and len(one.tokens) == 5


def test_cancelling_works_in_every_status(model):
    engine = Engine(model, slots=2, prefill_chunk=8)
    running, reading, waiting = (engine.submit([1] * n, max_tokens=50, temperature=0) for n in (2, 40, 3))
    engine.step()
    engine.step()
    assert [r.status for r in (running, reading, waiting)] == ["running", "prefilling", "waiting"]
    tokens = list(running.tokens)
    for request in (waiting, reading, running):
        engine.cancel(request)
        engine.cancel(request)  # a second time changes nothing
        assert (request.status, request.finish_reason, request.done) == ("cancelled", "cancelled", True)
    assert engine.idle and engine.step() == []
    assert running.tokens == tokens and reading.tokens == waiting.tokens == []
    after = [engine.submit([4, 5, 6], max_tokens=5, temperature=0) for _ in range(3)]  # more than slots
    engine.run()
    assert [r.tokens for r in after] == 3 * [list(stream(model, [4, 5, 6], max_tokens=5, temperature=0))]
    engine.cancel(after[0])
    assert (after[0].status, after[0].finish_reason) == ("finished", "length")
    for steps in (0, 1):
        foreign = Engine(model)
        request = foreign.submit([1], max_tokens=9)
        [foreign.step() for _ in range(steps)]
        with pytest.raises(HLAError, match="another engine"):
            engine.cancel(request)
        with pytest.raises(HLAError, match="another engine"):
            list(engine.stream(request))


def test_a_thousand_requests_come_and_go_in_constant_memory():
    model = make_model(num_hidden_layers=1)
    engine, rng = Engine(model, slots=16, prefill_chunk=128), random.Random(0)
    tensors = [x for c in (engine._states, engine._prompt_state) for y in c.layers for x in state_tensors(y.state)]
    addresses, size = [x.data_ptr() for x in tensors], engine.nbytes()
    live, ended, delivered, memory = [], [], {}, []
    submitted = cancelled_at = 0
    cancelled = {"waiting": 0, "prefilling": 0, "running": 0}
    while submitted < 1000 or not engine.idle:
        for _ in range(min(rng.randrange(4), 1000 - submitted)):
            ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 200))]
            options = rng.choice([{"temperature": 0}, {"seed": submitted}, {"seed": submitted, "top_p": 0.9}])
            live.append(engine.submit(ids, max_tokens=rng.randint(1, 50), stop_ids=[3], **options))
            submitted += 1
        for request, _ in engine.step():
            delivered[request.id] = delivered.get(request.id, 0) + 1
        if live and rng.random() < 0.15:
            request = rng.choice(live)
            if not request.done:
                cancelled[request.status] += 1
                cancelled_at += 1
            engine.cancel(request)
        ended += [(r.id, r.status, r.finish_reason, len(r.tokens), r.max_tokens, 3 in r.tokens) for r in live if r.done]
        live = [r for r in live if not r.done]
        if len(ended) // 100 > len(memory):
            request = None
            gc.collect()
            objects = gc.get_objects()
            assert sum(type(x) is Request for x in objects) == len(live)  # the engine keeps none that has ended
            held = {id(x): x.numel() * x.element_size() for x in objects if type(x) in (torch.Tensor, nn.Parameter)}
            memory.append((sum(held.values()), resident_bytes()))
            del objects, held
    assert sorted(x[0] for x in ended) == list(range(1000)) and not live  # none lost, none twice
    for number, status, reason, count, most, met_stop in ended:
        assert delivered.get(number, 0) == count <= most
        assert (status == "cancelled") == (reason == "cancelled")
        assert reason != "length" or count == most
        assert reason == "cancelled" or (reason == "eos") == met_stop
    assert {x[2] for x in ended} == {"eos", "length", "cancelled"}
    assert sum(x[2] == "cancelled" for x in ended) == cancelled_at and min(cancelled.values()) > 0
    assert engine._slots == [None] * 16 and not engine._waiting and engine._prefilling is None
    assert [x.data_ptr() for x in tensors] == addresses and engine.nbytes() == size
    in_tensors, resident = zip(*memory, strict=True)
    assert len(memory) == 10 and len(set(in_tensors)) == 1
    assert max(resident[5:]) - max(resident[:5]) < 4e6


def resident_bytes() -> int:
    """Memory of this process as the operating system counts it (0 where it has no such file)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def test_compiled_decoding_is_one_graph(model, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    engine = Engine(model, slots=3, prefill_chunk=8, compile=True)
    assert len(graphs) == 1  # when it is made, not when the first request comes
    asked = prompts(10, longest=20, seed=12)
    requests = [engine.submit(ids, max_tokens=6, temperature=0) for ids in asked]
    engine.run()
    assert len(graphs) == 1
    for ids, request in zip(asked, requests, strict=True):
        assert request.tokens == list(stream(model, ids, max_tokens=6, temperature=0))


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"slots": 0}, "slots must be a whole number of at least 1, not 0"),
        ({"slots": 2.5}, "slots must be a whole number of at least 1, not 2.5"),
        ({"prefill_chunk": 0}, "prefill_chunk must be a whole number of at least 1, not 0"),
        ({"cuda_graph": True}, "CUDA graph needs a model on a CUDA device, and this one is on cpu"),
        ({"model": nn.Linear(2, 2)}, "needs an HLAForCausalLM, not Linear"),
        ({"model": make_model(layer_types=["linear_attention", "full_attention"])}, "HLA layers only"),
        ({"model": make_model().train()}, "model.eval()"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(model, wrong, message):
    with pytest.raises(HLAError, match=re.escape(message)):
        Engine(**{"model": model, **wrong})


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"ids": []}, "the prompt is empty"),
        ({"ids": "text"}, "ids must be a flat sequence of token ids, not str"),
        ({"ids": [1.5]}, "ids must be a flat sequence of token ids, not list"),
        ({"ids": None}, "ids must be a flat sequence of token ids, not NoneType"),
        ({"ids": torch.zeros(1, 3, dtype=torch.int64)}, "ids must be a flat sequence of token ids"),
        ({"ids": torch.zeros(3)}, "ids must be a flat sequence of token ids"),
        ({"ids": [1, VOCAB]}, "ids holds 257, which is outside the vocabulary of 257 ids"),
        ({"ids": [-1]}, "ids holds -1, which is outside the vocabulary"),
        ({"stop_ids": 3}, "stop_ids must be a flat sequence of token ids, not int"),
        ({"stop_ids": [VOCAB]}, "stop_ids holds 257, which is outside the vocabulary"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 0}, "top_p must be"),
        ({"cache": [1]}, "cache must be an HLACache, not list"),
        ({"cache": "fresh"}, "the cache is empty"),
        ({"cache": "of two"}, "the cache holds 2 sequences; a request goes on from one"),
        ({"cache": "of another"}, "the cache belongs to a model of another shape"),
        ({"cache": "of a hybrid"}, "the cache belongs to a model of another shape"),
    ],
)
def test_a_request_that_means_nothing_is_refused(model, wrong, message):
    engine = Engine(model, slots=2)
    if isinstance(name := wrong.get("cache"), str):
        options = {"of another": {"num_hidden_layers": 1}, "of a hybrid": {"layer_types": ["full_attention"] * 2}}
        other = make_model(**options.get(name, {}))
        cache = HLACache(other.config)
        if name != "fresh":
            with torch.inference_mode():
                other(torch.ones(2 if name == "of two" else 1, 3, dtype=torch.int64), past_key_values=cache)
        wrong = {"cache": cache}
    with pytest.raises(HLAError, match=re.escape(message)):
        engine.submit(**{"ids": [1], "max_tokens": 2, **wrong})
    assert engine.idle


def test_the_page_about_the_engine_works(capsys):
    page = (Path(__file__).parents[1] / "docs" / "engine.md").read_text(encoding="utf-8")
    for snippet in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(snippet, "docs/engine.md", "exec"), {})
    assert capsys.readouterr().out
    assert hla.generate.Engine is Engine
