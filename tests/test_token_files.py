import json
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import hla.sources
import hla.token_files
from hla.cli import app
from hla.data import NEAR_DUPLICATE, Document, TokenStream, read_documents, similarities
from hla.errors import HLAError
from hla.evaluate import held_out_documents
from hla.sources import Mixture, prepare
from hla.token_files import build_tokens, is_token_folder, open_tokens
from hla.train import train
from hla.train_config import TrainConfig
from tests.text_helpers import documents, micro_config, sentences, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r.get("loss", r.get("val_loss")) for r in records if "loss" in r or "val_loss" in r]


# ------------------------------------------------------------------------------------------------------ token files


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_run_on_tokens_is_the_run_on_the_text(kind, corpus, tmp_path):
    tokens = tmp_path / "corpus.tokens"
    result = CliRunner().invoke(
        app, ["tokenize", str(corpus), "--out", str(tokens), "--tokenizer", kind, "--vocab-size", "300"]
    )
    assert result.exit_code == 0 and f"hla train {tokens}" in result.stderr.replace("\n", ""), result.stderr
    options = {"steps": 3, "tokenizer": kind, "vocab_size": 300}
    train(micro_config(corpus, tmp_path / "text", **options))
    run = train(micro_config(tokens, tmp_path / "tokens", **options))
    assert losses(tmp_path / "tokens") == losses(tmp_path / "text")
    training = json.loads((run.folder / "training.json").read_text())
    assert held_out_documents(training, run.folder) == open_tokens(tokens).held_out


def test_tokens_are_mapped_and_not_read(corpus, tmp_path):
    built = build_tokens([str(corpus)], tmp_path / "t", tokenizer="bytes")
    assert isinstance(built.train.tokens, np.memmap) and built.train.tokens.dtype == np.uint16
    (tmp_path / "t" / "tokens.bin").chmod(0o400)
    assert is_token_folder(tmp_path / "t") and not is_token_folder(corpus)


@pytest.fixture
def large(monkeypatch):
    """Thresholds at which a small corpus is a large one."""
    monkeypatch.setattr(hla.token_files, "IN_MEMORY", 3000)
    monkeypatch.setattr(hla.token_files, "HELD_OUT_BYTES", 1500)
    monkeypatch.setattr(hla.token_files, "GROUP", 1000)


def test_large_text_is_split_without_near_duplicates(large, tmp_path):
    originals = documents(12, words=60)
    copies = [Document(f"copy {d.name}", d.text.upper()) for d in originals[:6]]
    with (tmp_path / "all.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": d.text, "other": 1}) + "\n" for d in [*originals, *copies])
    excluded = 0
    for seed in range(4):
        built = build_tokens([str(tmp_path / "all.jsonl")], tmp_path / f"t{seed}", vocab_size=300, seed=seed)
        stream = built.train
        borders = [*stream.starts.tolist(), len(stream)]
        texts = [Document("", built.tokenizer.decode(stream.tokens[a + 1 : b])) for a, b in pairwise(borders)]
        everything = {d.text for d in [*originals, *copies]}
        assert {d.text for d in texts} <= everything and stream.tokens[0] == built.tokenizer.eos_token_id
        assert built.held_out and max(similarities(built.held_out, texts)) < NEAR_DUPLICATE
        facts = json.loads((tmp_path / f"t{seed}" / "tokens.json").read_text())
        assert len(texts) + len(built.held_out) + facts["held_out"]["excluded"] == 18
        excluded += facts["held_out"]["excluded"]
        assert facts["bytes"] == sum(d.size for d in texts) and facts["documents"] == len(texts)
    assert excluded > 0  # or this test could not tell


def test_large_text_is_read_one_document_at_a_time(large, tmp_path, monkeypatch):
    """The longest list of texts that anything holds is a group of one or two documents."""
    write_corpus(tmp_path / "corpus", count=20, words=100)
    held: list[int] = []
    real = hla.token_files._groups

    def groups(texts):
        for group in real(texts):
            held.append(len(group))
            yield group

    monkeypatch.setattr(hla.token_files, "_groups", groups)
    build_tokens([str(tmp_path / "corpus")], tmp_path / "t", tokenizer="bytes")
    assert sum(held) >= 15 and max(held) <= 2


def test_what_cannot_be_built_leaves_nothing(large, corpus, tmp_path):
    text = documents(1, words=60)[0].text
    (tmp_path / "copies.jsonl").write_text(9 * (json.dumps({"text": text}) + "\n"))
    cases = {
        r"all \d candidates are near-duplicates": [str(tmp_path / "copies.jsonl")],
        "no file or folder": [str(tmp_path / "missing")],
        "can be read only once": ["-"],
    }
    for sentence, sources in cases.items():
        with pytest.raises(HLAError, match=sentence):
            build_tokens(sources, tmp_path / "t", tokenizer="bytes")
    with pytest.raises(HLAError, match="unknown tokenizer 'words'"):
        build_tokens([str(corpus)], tmp_path / "t", tokenizer="words")
    with pytest.raises(HLAError, match="exists already"):
        build_tokens([str(corpus)], tmp_path, tokenizer="bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["copies.jsonl"]


def test_damaged_tokens_are_noticed(corpus, tmp_path):
    build_tokens([str(corpus)], tmp_path / "t", tokenizer="bytes")

    def damaged(name: str, content: bytes) -> str:
        folder = shutil.copytree(tmp_path / "t", tmp_path / "damaged", dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(HLAError) as error:
            open_tokens(folder)
        return str(error.value)

    assert "tokens.bin does not have" in damaged("tokens.bin", b"123")
    assert "held_out.jsonl has changed" in damaged("held_out.jsonl", b'{"name": "", "text": "other"}\n')
    assert "is damaged" in damaged("tokens.json", b"{}")


@pytest.mark.parametrize("line", ['{"txt": "a"}', "plain", '["text"]', '{"text": 3}'])
def test_lines_that_are_no_documents_are_told(line, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "first"}\n\n{"text": " "}\n' + line)
    with pytest.raises(HLAError, match=r"line 4 of .*x.jsonl"):
        read_documents([str(tmp_path / "x.jsonl")])


# ------------------------------------------------------------------------------------------------------ mixtures


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4),
    lengths=st.lists(st.integers(8, 900), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
@settings(max_examples=20)
def test_a_mixture_gives_each_stream_its_share_and_whole_epochs(weights, lengths, seed):
    context, block = 4, 128
    streams = tuple(TokenStream(np.arange(n + 1), np.array([0])) for n in lengths[: len(weights)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hla.sources, "BLOCK", block)
        mixture = Mixture(streams, tuple(weights))
        assert sum(mixture.quotas) == block and min(mixture.quotas) >= 1
        rows = [mixture.row(n, context, seed) for n in range(2 * block)]
        assert mixture.row(17, context, seed) == rows[17]  # after others: a function of the number alone
    for part in (rows[:block], rows[block:]):
        counts = Counter(id(stream) for stream, _, _ in part)
        for stream, weight in zip(streams, weights, strict=True):
            assert abs(counts[id(stream)] - block * weight / sum(weights)) <= len(weights)
    for stream in streams:
        starts = [start for s, start, _ in rows if s is stream]
        epoch = len(stream) // context
        assert all(len(set(starts[i : i + epoch])) == len(starts[i : i + epoch]) for i in range(0, len(starts), epoch))


def test_streams_of_a_mixture_take_turns():
    streams = tuple(TokenStream(np.arange(900), np.array([0])) for _ in range(2))
    mixture = Mixture(streams, (3.0, 1.0))
    first = [sum(mixture.row(n, 8, 0)[0] is streams[1] for n in range(i, i + 100)) for i in (0, 100, 2000)]
    assert all(10 < count < 40 for count in first) and len(set(first)) > 1
    assert mixture.batch(1, rows=4, context=8).input_ids.shape == (1, 32)


def test_a_run_on_a_mixture_goes_on_and_scores_all_sources(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(sentences(800, seed=77))
    build_tokens([str(other)], tmp_path / "other.tokens", tokenizer="bytes")
    data = (str(corpus), str(tmp_path / "other.tokens"))
    prepared = prepare(TrainConfig(data=data, weights=(3.0, 1.0), tokenizer="bytes", context=32))
    assert len(prepared.held_documents) > 1 and "other.tokens (weight 1)" in prepared.description
    assert prepared.held_documents[-1] == open_tokens(tmp_path / "other.tokens").held_out[-1]

    def run(name: str, **more: object) -> Path:
        options = [*data, "--weights", "3,1", "--out", str(tmp_path / name)]
        micro = micro_config(corpus, tmp_path / name)
        options += [f"--set={key}={value}" for key, value in micro.model.items()]
        options += ["--tokenizer=bytes", "--context=32", "--batch-size=2", "--device=cpu"]
        result = CliRunner().invoke(app, ["train", *options, *(f"--{k}={v}" for k, v in more.items() if v is not True),
                                          *(f"--{k}" for k, v in more.items() if v is True)])  # fmt: skip
        assert result.exit_code == 0, result.stderr
        return tmp_path / name

    whole = losses(run("whole", steps=6, **{"save-every": 3}))
    part = run("part", steps=6, **{"save-every": 3})
    shutil.rmtree(part / "checkpoints" / "step-00000006")
    assert losses(run("part", steps=6, resume=True)) == whole
    training = json.loads((part / "training.json").read_text())
    assert held_out_documents(training, part) == prepared.held_documents


def test_mixtures_that_cannot_be(corpus, tmp_path):
    for name, vocab_size in (("a", 300), ("b", 310)):
        build_tokens([str(corpus)], tmp_path / name, vocab_size=vocab_size)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(HLAError, match="different tokenizers"):
        prepare(TrainConfig(data=(a, b), weights=(1.0, 1.0)))
    build_tokens([str(corpus)], tmp_path / "c", tokenizer=a)
    prepare(TrainConfig(data=(a, str(tmp_path / "c")), weights=(1.0, 1.0), context=32))
    with pytest.raises(HLAError, match="--weights"):
        prepare(TrainConfig(data=(a, str(corpus))))
    with pytest.raises(HLAError, match="1 weights for 2 sources"):
        TrainConfig(data=(a, b), weights=(1.0,))
    with pytest.raises(HLAError, match="positive numbers, not -1"):
        TrainConfig(data=(a,), weights=(-1.0,))


# ------------------------------------------------------------------------------------------------------ datasets


class Rows(list):
    """What this library uses of a datasets.Dataset."""

    column_names = ("text", "title")

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


def test_datasets_of_hugging_face_are_read_by_name(monkeypatch):
    def load_dataset(name, configuration, split):
        if name != "tiny/tales":
            raise ValueError(f"Dataset '{name}' doesn't exist on the Hub\nand more")
        return Rows({"text": t, "title": "", "asked": (configuration, split)} for t in ("one", " ", None, "two"))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [d.text for d in read_documents(["hf:tiny/tales:en"])] == ["one", "two"]
    with pytest.raises(
        HLAError, match="cannot load the dataset 'no/such': Dataset 'no/such' doesn't exist on the Hub$"
    ):
        read_documents(["hf:no/such"])
    monkeypatch.setattr(Rows, "column_names", ("story",))
    with pytest.raises(HLAError, match="has no column 'text'; it has 'story'"):
        read_documents(["hf:tiny/tales"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HLAError, match="pip install datasets"):
        read_documents(["hf:tiny/tales"])


def test_the_library_itself_reads_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in read_documents(["hf:./tales"])] == ["one", "two"]
