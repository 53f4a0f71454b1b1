"""What is wrong with a command is said before text is read, and before the ranks wait for one another."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

import hla.data
import hla.train
from hla.distributed.world import told_by
from hla.errors import HLAError
from hla.train import train
from hla.train_config import TrainConfig
from tests.text_helpers import micro_config, write_corpus

REFUSED = [
    ("decay", {"model": {"decay": "linear"}}, 1, "cannot be built: decay must be one of .*, got 'linear'"),
    ("op", {"model": {"op": "hla9"}}, 1, "cannot be built: op must be one of .*, got 'hla9'"),
    ("order", {"model": {"order": 17}}, 1, "order must be from 1 to 16, got 17"),
    ("heads", {"model": {"num_attention_heads": 5}}, 1, r"hidden_size \(32\) must be a multiple of num_"),
    ("groups", {"model": {"num_key_value_heads": 3}}, 1, r"must be a multiple of num_key_value_heads \(3\)"),
    ("layers", {"model": {"num_hidden_layers": 2.5}}, 1, "num_hidden_layers must be an integer, got 2.5"),
    ("rope", {"model": {"head_dim": 7}}, 1, "head_dim must be even"),
    ("tokenizer", {"tokenizer": "words"}, 1, "unknown tokenizer 'words'"),
    ("vocabulary", {"tokenizer": "bpe", "vocab_size": 10}, 1, "vocab_size must be at least 258"),
    ("rows", {"batch_size": 3}, 2, "batch_size must be divisible by dp: 3 rows for 2 ranks"),
    ("tp and heads", {"tp": 2, "model": {"num_attention_heads": 1}}, 2, "with --tp 2: num_kv_heads must be divisible"),
    ("tp and MLP", {"tp": 2, "model": {"intermediate_size": 65}}, 2, "with --tp 2: intermediate_size must be div"),
    ("tp and decay", {"tp": 2, "model": {"decay": "fixed"}}, 2, 'with --tp 2: decay must be "none" or "token"'),
    ("sp", {"sp": 2, "attention": "hla,softmax", "model": {"num_hidden_layers": 2}}, 2, "with --sp 2: softmax layers"),
    ("file", {"data": ("missing.txt",)}, 2, "there is no file or folder 'missing.txt'"),
    ("pattern", {"data": ("*.nothing",)}, 2, "no file matches the pattern"),
    ("corpus", {"data": ()}, 2, "the built-in corpus is not installed"),
    ("datasets", {"data": ("hf:some/texts",)}, 2, "needs the library datasets"),
]  # fmt: skip


def read(config: TrainConfig) -> None:
    raise AssertionError("text is read")


@pytest.mark.parametrize("settings, ranks, sentence", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_it_is_refused_at_once(settings, ranks, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hla.train, "prepare", read)
    monkeypatch.setattr(hla.data, "find_spec", lambda name: None)  # no built-in corpus here
    monkeypatch.setitem(sys.modules, "datasets", None)  # nor this library
    monkeypatch.setenv("WORLD_SIZE", str(ranks))  # of which this is the only one: it would wait for the other
    data = settings.get("data", (str(write_corpus(tmp_path / "corpus", count=2)),))
    others = {name: value for name, value in settings.items() if name != "data"}
    config = replace(micro_config(tmp_path / "corpus", tmp_path / "run", **others), data=data)
    with pytest.raises(HLAError, match=sentence) as error:
        train(config)
    assert told_by(error.value) == "LOCAL_RANK" and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_brings_its_own_tokenizer_needs_no_setting_of_one(tmp_path, monkeypatch):
    """Nor is a model refused for the ids of a vocabulary that is not known yet."""
    (tmp_path / "tokens.json").write_text("{}")
    monkeypatch.setattr(hla.train, "prepare", read)
    settings = {"tokenizer": "words", "model": {"pad_token_id": 10**6}}
    with pytest.raises(AssertionError, match="text is read"):
        train(micro_config(tmp_path, tmp_path / "run", **settings))
