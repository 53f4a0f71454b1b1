import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hla.data import (
    END_OF_DOCUMENT,
    NEAR_DUPLICATE,
    Document,
    TokenStream,
    build_tokenizer,
    encode_documents,
    encode_text,
    fingerprint,
    read_documents,
    similarities,
    split_documents,
    token_bytes,
)
from hla.errors import HLAError
from tests.text_helpers import documents, sentences, write_corpus

# ------------------------------------------------------------------------------------------------------ documents


def test_files_folders_and_patterns_are_read_once_in_a_fixed_order(tmp_path):
    folder = write_corpus(tmp_path / "texts", count=3)
    (folder / "deep").mkdir()
    (folder / "deep" / "more.md").write_text("more text")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\xff")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "nothing.txt").write_text("")
    (folder / ".hidden").write_text("not this")
    everything = read_documents([str(folder)])
    assert [d.text for d in everything] == ["more text", *(d.text for d in documents(3))]
    again = read_documents([str(folder / "doc1.txt"), str(folder / "**" / "*.md"), str(folder)])
    assert [d.text for d in again] == [documents(3)[1].text, "more text", documents(3)[0].text, documents(3)[2].text]


def test_standard_input_is_a_document(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("über\r\n".encode())))
    assert [d.text for d in read_documents(["-"])] == ["über\r\n"]


def test_the_default_corpus_is_real_english():
    corpus = read_documents()
    assert len(corpus) > 200 and sum(d.size for d in corpus) > 10 << 20
    assert sum("fellow" in d.text.lower() and "congress" in d.text.lower() for d in corpus) > 100


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "missing.txt", "no file or folder"),
        (lambda p: p / "*.txt", "no file matches"),
        (lambda p: (p / "empty").write_text(" \n") and p / "empty", "empty"),
        (lambda p: (p / "binary").write_bytes(b"a\0b") and p / "binary", "not UTF-8"),
        (lambda p: (p / "latin").write_bytes(b"caf\xe9") and p / "latin", "not UTF-8"),
        (lambda p: p, "no text file"),
    ],
)
def test_sources_without_text_are_refused(tmp_path, make, message):
    with pytest.raises(HLAError, match=message):
        read_documents([str(make(tmp_path))])


# ------------------------------------------------------------------------------------------------------ held out


def test_the_held_out_part_of_the_default_corpus_is_large_and_new():
    corpus = read_documents()
    split = split_documents(corpus)
    assert sum(d.size for d in split.held_out) >= 1 << 20
    assert not {d.name for d in split.held_out} & {d.name for d in split.train}
    assert len(split.train) + len(split.held_out) + len(split.excluded) == len(corpus)

    def phrases(document: Document) -> set[tuple[str, ...]]:  # an oracle of another kind: all runs of eight words
        words = document.text.lower().split()
        return set(zip(*(words[i:] for i in range(8)), strict=False))

    held = [phrases(d) for d in split.held_out]
    worst = max(len(h & t) / len(h) for t in map(phrases, split.train) for h in held)
    assert worst < NEAR_DUPLICATE
    assert split.largest_similarity == pytest.approx(worst, abs=0.05)
    assert "0 of 249" in split.describe() or len(split.excluded) > 0


@pytest.mark.parametrize("seed", range(6))
def test_near_duplicates_of_training_documents_are_never_held_out(seed):
    originals = documents(8, words=200)
    # the same words with other spaces, in capitals; and a piece out of the middle
    retouched = [Document(f"copy of {d.name}", d.text.upper().replace("\n", "  \n")) for d in originals]
    excerpts = [Document(f"part of {d.name}", d.text[100:700]) for d in originals]
    unique = [Document(f"own {i}", sentences(60, seed=100 + i)) for i in range(8)]
    split = split_documents([*originals, *retouched, *excerpts, *unique], seed, held_out_bytes=2000)
    trained_on = {d.name.split()[-1] for d in split.train if not d.name.startswith("own")}
    assert trained_on and not trained_on & {d.name.split()[-1] for d in split.held_out}
    assert sum(d.size for d in split.held_out) >= 2000
    assert split.excluded and all(not d.name.startswith("own") for d in split.excluded)
    assert split.largest_similarity < NEAR_DUPLICATE
    assert not {d.name for d in [*split.train, *split.held_out]} & {d.name for d in split.excluded}


def test_a_corpus_of_copies_has_nothing_to_hold_out():
    text = documents(1)[0].text
    with pytest.raises(HLAError, match="near-duplicates"):
        split_documents([Document(str(i), text) for i in range(40)])


def test_the_split_depends_on_the_seed_alone():
    corpus = documents(30)
    assert split_documents(corpus, 1) == split_documents(corpus, 1)
    assert len({fingerprint(split_documents(corpus, seed).held_out) for seed in range(5)}) > 1


def test_one_long_document_gives_its_end_and_its_copy_is_excluded():
    long = Document("long", sentences(2000, seed=5))
    split = split_documents([long])
    assert split.train[0].text + split.held_out[0].text == long.text
    assert split.held_out[0].size >= long.size // 10 and split.cut_from == "long"
    split = split_documents([long, Document("copy", long.text.replace("\n", " "))])
    assert [d.name for d in split.excluded] and len(split.train) == 1


def test_similarity_is_the_share_found_in_one_other_document():
    first, second, third = (sentences(2000, seed) for seed in (1, 2, 3))
    documents_ = [Document(t[:5], t) for t in (first, second, third)]
    half = Document("half", first[:8000] + third[:8000])
    assert similarities([documents_[0]], documents_)[0] == 1
    assert similarities([documents_[0]], documents_[1:])[0] < 0.02
    assert similarities([half], [documents_[0]])[0] == pytest.approx(0.5, abs=0.05)
    assert similarities([Document("", "short")], [Document("", "Short "), documents_[0]])[0] == 1
    assert similarities([Document("", "short")], [Document("", "other"), documents_[0]])[0] == 0


# ------------------------------------------------------------------------------------------------------ tokenizers

TOKENIZERS = {
    "bytes": build_tokenizer("bytes", 0, []),
    "bpe": build_tokenizer("bpe", 320, documents(12)),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text() | st.sampled_from([f"a{END_OF_DOCUMENT}b", "  \r\n\n x", "é世🙂\u200d"]))
@settings(deadline=None)
def test_text_comes_back_to_the_byte(kind, text):
    tokenizer = TOKENIZERS[kind]
    (ids,) = encode_text(tokenizer, [text])
    table = token_bytes(tokenizer)
    assert b"".join(table[i] for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids
    if kind == "bytes":
        assert ids == list(text.encode())


def test_the_vocabulary_ends_with_the_end_of_a_document():
    assert len(TOKENIZERS["bytes"]) == 257 and len(TOKENIZERS["bpe"]) == 320
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == len(tokenizer) - 1
        assert token_bytes(tokenizer)[-1] == b""
        assert {len(t) for t in token_bytes(tokenizer)[:256]} == {1}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_saved_tokenizer_is_the_same_in_hugging_face(kind, tmp_path):
    TOKENIZERS[kind].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = documents(1)[0].text + "é世🙂 "
    assert loaded(text).input_ids == [loaded.eos_token_id, *next(encode_text(TOKENIZERS[kind], [text]))]
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind, size, message", [("bpe", 257, "258"), ("words", 4096, "unknown tokenizer")])
def test_tokenizers_that_cannot_be(kind, size, message):
    with pytest.raises(HLAError, match=message):
        build_tokenizer(kind, size, documents(2))


# ------------------------------------------------------------------------------------------------------ batches


def stream_of(lengths: list[int]) -> TokenStream:
    """Documents whose tokens all differ: token i of the stream is i, but the document starts are what they are."""
    starts = np.cumsum([0, *lengths])
    return TokenStream(np.arange(starts[-1] + 1), starts[:-1])


def test_encoded_documents_begin_and_end_with_the_end_token():
    tokenizer = TOKENIZERS["bytes"]
    stream = encode_documents(tokenizer, [Document("", "ab"), Document("", "c")])
    assert stream.tokens.tolist() == [256, 97, 98, 256, 99, 256] and stream.tokens.dtype == np.uint16
    assert stream.starts.tolist() == [0, 3] and len(stream) == 5


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda x: sum(x) >= 9),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_an_epoch_is_every_row_once_with_borders_at_rows_and_documents(lengths, rows, seed):
    context = 9
    stream = stream_of(lengths)
    seen: list[int] = []
    for step in range(stream.steps_per_epoch(rows, context)):
        batch = stream.batch(2, step, rows=rows, context=context, seed=seed)
        tokens = batch.input_ids[0].tolist()
        assert batch.targets[0].tolist() == [t + 1 for t in tokens]
        borders = {i for i, t in enumerate(tokens) if i % context == 0 or t in stream.starts} | {len(tokens)}
        assert batch.cu_seqlens.tolist() == sorted(borders)
        seen += tokens
    assert len(seen) == len(set(seen)) == len(stream) // context * context


def test_batches_are_a_function_of_seed_epoch_and_step():
    stream = stream_of([100, 57, 300])
    one, same, epoch, seed = (
        stream.batch(e, 3, rows=4, context=16, seed=s).input_ids.tolist() for e, s in [(0, 7), (0, 7), (1, 7), (0, 8)]
    )
    assert one == same and one != epoch and one != seed
    with pytest.raises(ValueError, match="step"):
        stream.batch(0, stream.steps_per_epoch(4, 16), rows=4, context=16)
