"""Small corpora and small runs for the tests of data, training, generation and the command line."""

from pathlib import Path

import numpy as np
import torch

from hla.data import Document
from hla.train_config import TrainConfig

with torch.device("meta"):  # lets PyTorch list its constructors before conftest wraps them: loading models needs that
    torch.empty(0)

SYLLABLES = ["ba", "co", "di", "fu", "ga", "hel", "in", "jo", "ka", "lu", "men", "no", "or", "pa", "ri", "sol", "te"]
MICRO = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
MICRO_OPTIONS = [text for name, value in MICRO.items() for text in ("--set", f"{name}={value}")]


def sentences(words: int, seed: int) -> str:
    """Made-up text of so many words from a small vocabulary, with sentences and lines."""
    rng = np.random.default_rng(seed)
    vocabulary = ["".join(rng.choice(SYLLABLES, 2)) for _ in range(60)]
    out = []
    for i in range(words):
        out.append(vocabulary[int(rng.integers(60))] + (".\n" if i % 9 == 8 else " "))
    return "".join(out)


def documents(count: int = 12, words: int = 120) -> list[Document]:
    """Documents that have nothing to do with one another."""
    return [Document(f"doc{i}", sentences(words, seed=i)) for i in range(count)]


def write_corpus(folder: Path, count: int = 12, words: int = 120) -> Path:
    """A folder with such documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for document in documents(count, words):
        (folder / f"{document.name}.txt").write_text(document.text, encoding="utf-8")
    return folder


def micro_config(data: Path, out: Path, **settings: object) -> TrainConfig:
    """A run of a few seconds."""
    model = {**MICRO, **settings.pop("model", {})}  # type: ignore[dict-item]
    defaults = {"tokenizer": "bytes", "context": 32, "batch_size": 2, "steps": 4, "device": "cpu"}
    return TrainConfig(data=(str(data),), out=str(out), model=model, **{**defaults, **settings})  # type: ignore[arg-type]
