import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hla.data import build_tokenizer, encode_text
from hla.errors import HLAError
from hla.generate import TextDecoder, check_sampling, prompt_ids, sample, stream
from hla.models import HLACache, HLAConfig, HLAForCausalLM
from tests.text_helpers import MICRO

BYTES = build_tokenizer("bytes", 0, [])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = HLAConfig(**MICRO, vocab_size=257, initializer_range=0.5)
    return HLAForCausalLM(config).eval()


def bytes_of(cache: HLACache) -> int:
    """All tensor bytes reachable from a cache."""
    found: dict[int, int] = {}
    pending: list[object] = [cache]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif hasattr(value, "__dict__"):
            pending += vars(value).values()
    return sum(found.values())


def test_memory_does_not_grow_with_length(model):
    cache = HLACache(model.config)
    sizes = {}
    for count, _ in enumerate(stream(model, [1, 2, 3], max_tokens=10_000, seed=0, cache=cache), start=1):
        if count in (10, 10_000):
            sizes[count] = bytes_of(cache)
    assert sizes[10] == sizes[10_000] > 0


def test_greedy_is_what_hugging_face_generates(model):
    ids = list(b"the state of the union")
    expected = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert list(stream(model, ids, max_tokens=40, temperature=0)) == expected.tolist()
    assert len(set(expected.tolist())) > 3
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert list(stream(model, ids, max_tokens=40, seed=1, **narrow)) == expected.tolist()


def test_a_seed_repeats_the_draw(model):
    one, same, other = (list(stream(model, [5], max_tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_the_end_token_ends_the_stream(model):
    first = next(stream(model, [1, 2], max_tokens=1, temperature=0))
    for end in (first, [256, first]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.config, "eos_token_id", end)
            assert list(stream(model, [1, 2], max_tokens=50, temperature=0)) == [first]


def test_sampling_follows_temperature_top_k_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])

    def shares(**options) -> torch.Tensor:
        settings_ = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
        generator = torch.Generator().manual_seed(0)
        drawn = sample(logits.expand(40_000, 5), **settings_, generator=generator)
        return drawn.bincount(minlength=5) / 40_000

    def renormalised(kept: int, temperature: float = 1.0) -> torch.Tensor:
        return torch.cat([(logits[:kept] / temperature).softmax(0), torch.zeros(5 - kept)])

    torch.testing.assert_close(shares(), renormalised(5), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), renormalised(5, 2.0), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_k=3), renormalised(3), atol=0.015, rtol=0)
    assert (shares(top_k=3)[3:] == 0).all()
    total = logits.softmax(0).cumsum(0)  # top_p between the shares of the first one and the first two ids keeps two
    torch.testing.assert_close(shares(top_p=float(total[:2].mean())), renormalised(2), atol=0.015, rtol=0)


@given(
    text=st.text(alphabet="ab.é世🙂", max_size=30),
    stop=st.lists(st.text(alphabet="ab.é", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None)
def test_text_streams_up_to_the_first_stop_string(text, stop):
    decoder = TextDecoder(BYTES, stop)
    pieces = [decoder.feed(token) for token in text.encode()]
    out = "".join(pieces) + decoder.close()
    # the first stop string to be complete ends the text, at the earliest place where one begins then
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
    expected = text if not ends else text[: min(at for s in stop if (at := text[: ends[0]].find(s)) >= 0)]
    assert out == expected
    assert decoder.stopped == bool(ends)
    assert "\ufffd" not in out


def test_characters_come_whole_and_at_once():
    decoder = TextDecoder(BYTES)
    assert [decoder.feed(byte) for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    decoder.feed(0xF0)
    assert decoder.close() == "\ufffd"


def test_a_prompt_is_the_beginning_of_a_document():
    assert prompt_ids(BYTES, "ab") == [256, 97, 98]
    assert next(encode_text(BYTES, ["ab"])) == [97, 98]
    with pytest.raises(HLAError, match="empty"):
        prompt_ids(BYTES, "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
    ],
)
def test_meaningless_sampling_is_refused(wrong):
    with pytest.raises(HLAError, match=next(iter(wrong))):
        check_sampling(**{"max_tokens": 1, "temperature": 1.0, "top_k": None, "top_p": None, **wrong})
    with pytest.raises(HLAError, match="stop"):
        TextDecoder(BYTES, [""])
