"""What a run reads: text or folders of tokens, one source or a mixture of several, as token streams."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hla.data import (
    Batch,
    Document,
    Row,
    TokenStream,
    build_tokenizer,
    encode_documents,
    pack_rows,
    read_documents,
    split_documents,
)
from hla.errors import HLAError
from hla.token_files import is_token_folder, open_tokens
from hla.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCK = 4096  # rows of a mixture in which every source has its exact share


@dataclass(frozen=True)
class Prepared:
    """What a run reads; ``digest`` is a SHA-256 that any change of the training tokens changes."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenStream | Mixture
    held_documents: list[Document]
    held_out: TokenStream
    digest: str
    description: str


@dataclass(frozen=True)
class Mixture:
    """Rows of several streams in given proportions; each stream goes through its own epochs.

    Of every 4096 rows, a fixed number comes from each stream, in an order drawn by (seed, block): which row is which
    is a function of its number alone, so a run can go on anywhere.
    """

    streams: tuple[TokenStream, ...]
    weights: tuple[float, ...]
    _order: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __len__(self) -> int:
        """Tokens of all streams that can be predicted."""
        return sum(map(len, self.streams))

    @property
    def quotas(self) -> list[int]:
        """Rows of each stream in a block: the weights, rounded to 1/4096; at least one."""
        exact = np.array(self.weights) / sum(self.weights) * BLOCK
        rows = np.maximum(exact.astype(int), 1)
        while rows.sum() != BLOCK:  # the largest remainder gets one more, or the largest excess one less
            sign = 1 if rows.sum() < BLOCK else -1
            rows[np.argmax(np.where((sign > 0) | (rows > 1), sign * (exact - rows), -np.inf))] += sign
        return [int(n) for n in rows]

    def batch(self, index: int, *, rows: int, context: int, seed: int = 0) -> Batch:
        """The ``index``-th batch since the beginning of the run."""
        return pack_rows(self.batch_rows(index, rows=rows, context=context, seed=seed))

    def batch_rows(self, index: int, *, rows: int, context: int, seed: int = 0) -> list[Row]:
        """What :meth:`batch` packs."""
        return [self.row(n, context, seed) for n in range(index * rows, (index + 1) * rows)]

    def row(self, number: int, context: int, seed: int) -> Row:
        """(stream, start, length) of a row, by its number since the beginning of the run."""
        block, within = divmod(number, BLOCK)
        if (seed, block) not in self._order:
            quotas = self.quotas
            sources = np.random.default_rng((seed, block)).permutation(np.repeat(np.arange(len(quotas)), quotas))
            ranks = np.zeros(BLOCK, np.int64)  # how many rows of the same stream came before, in this block
            for source, quota in enumerate(quotas):
                ranks[sources == source] = np.arange(quota)
            self._order.clear()
            self._order[seed, block] = sources, ranks
        sources, ranks = self._order[seed, block]
        source = int(sources[within])
        stream = self.streams[source]
        epoch, row = divmod(block * self.quotas[source] + int(ranks[within]), len(stream) // context)
        return (stream, *stream.row(epoch, row, context, seed))


def step_batches(train: TokenStream | Mixture, config: TrainConfig, step: int) -> list[Batch]:
    """The micro-batches of ``step``: a function of the data, the configuration and the step alone."""
    return [pack_rows(rows) for rows in step_rows(train, config, step)]


def step_rows(train: TokenStream | Mixture, config: TrainConfig, step: int) -> list[list[Row]]:
    """The rows of each micro-batch of ``step``, for ranks that share them out before they are packed."""
    size = {"rows": config.batch_size, "context": config.context, "seed": config.seed}
    numbers = range(step * config.accumulate, (step + 1) * config.accumulate)
    if isinstance(train, Mixture):
        return [train.batch_rows(n, **size) for n in numbers]
    per_epoch = train.steps_per_epoch(config.batch_size, config.context)
    return [train.batch_rows(*divmod(n, per_epoch), **size) for n in numbers]


@dataclass(frozen=True)
class _Source:
    """One of the sources of a mixture, or all that is no mixture: text, or tokens already."""

    name: str
    texts: list[Document]
    held: list[Document]
    description: str
    tokenizer: PreTrainedTokenizerFast | None = None
    train: TokenStream | None = None
    digest: str = ""


def _sources(config: TrainConfig) -> list[_Source]:
    groups = [(source,) for source in config.data] if config.weights else [config.data]
    return [_open(group, config.seed) for group in groups]


def _open(names: Sequence[str], seed: int) -> _Source:
    name = ", ".join(names)
    if any(is_token_folder(Path(n)) for n in names):
        if len(names) > 1:
            raise HLAError("a folder of tokens among several sources: say with --weights how to mix them")
        opened = open_tokens(Path(name))
        return _Source(name, [], opened.held_out, opened.description, opened.tokenizer, opened.train, opened.digest)
    split = split_documents(read_documents(names), seed)
    return _Source(name, split.train, split.held_out, split.describe())


def prepare(config: TrainConfig) -> Prepared:
    """Read, split and tokenize text; map tokens.

    Raises:
        HLAError: see :mod:`hla.data` and :mod:`hla.token_files`; also when training text is shorter than one context,
            or folders of tokens have different tokenizers.
    """
    sources = _sources(config)
    made = [s.tokenizer for s in sources if s.tokenizer is not None]
    if any(t.backend_tokenizer.to_str() != made[0].backend_tokenizer.to_str() for t in made):
        raise HLAError(
            "the folders of tokens were made with different tokenizers: make one with --tokenizer FOLDER of the other"
        )
    texts = [document for source in sources for document in source.texts]
    tokenizer = made[0] if made else build_tokenizer(config.tokenizer, config.vocab_size, texts)
    streams, digests = [], []
    for source in sources:
        stream = source.train or encode_documents(tokenizer, source.texts)
        if len(stream) < config.context:
            of = f" of {source.name!r}" if config.weights else ""
            raise HLAError(
                f"the training text{of} has {len(stream)} tokens, fewer than one context of {config.context}: "
                "give more text or a smaller --context"
            )
        streams.append(stream)
        digests.append(source.digest or hashlib.sha256(stream.tokens.data).hexdigest())
    held = [document for source in sources for document in source.held]
    descriptions = [s.description for s in sources]
    if config.weights:
        descriptions = [
            f"{s.name} (weight {w:g}): {s.description}" for s, w in zip(sources, config.weights, strict=True)
        ]
    return Prepared(
        tokenizer,
        Mixture(tuple(streams), config.weights) if config.weights else streams[0],
        held,
        encode_documents(tokenizer, held),
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "\n".join(descriptions),
    )


def held_out_documents(config: TrainConfig) -> list[Document]:
    """The documents that a run with this configuration holds out."""
    return [document for source in _sources(config) for document in source.held]
