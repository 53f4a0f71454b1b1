"""Folders of tokens: text of any size, tokenized once, and mapped into memory by every run that reads it.

``tokens.bin`` is the training text as one array (see :class:`hla.data.TokenStream`), ``starts.npy`` where its documents
begin, ``held_out.jsonl`` the documents held out, ``tokenizer.json`` and ``tokenizer_config.json`` the tokenizer,
``tokens.json`` what all this is. Text is read document by document, never as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hla.checkpoint import flush
from hla.data import (
    DEFAULT_CORPUS,
    HELD_OUT_BYTES,
    HUB,
    NEAR_DUPLICATE,
    Document,
    Similarity,
    TokenStream,
    build_tokenizer,
    fingerprint,
    plain_tokenizer,
    split_documents,
    stream_documents,
    token_bytes,
)
from hla.errors import HLAError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INDEX_FILE = "tokens.json"
FORMAT = 1
IN_MEMORY = 64 << 20  # bytes: less text is split and its tokenizer trained as hla train would, more on samples
GROUP = 1 << 20  # characters tokenized at a time


@dataclass(frozen=True)
class TokenFolder:
    """An open folder of tokens; ``train`` is mapped into memory, ``digest`` the SHA-256 of its tokens."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenStream
    held_out: list[Document]
    digest: str
    description: str


def is_token_folder(path: Path) -> bool:
    """Whether ``path`` is what :func:`build_tokens` makes."""
    return (path / INDEX_FILE).is_file()


def absolute_sources(sources: Sequence[str]) -> list[str]:
    """Sources of text so that they mean the same from any working folder."""

    def anywhere(source: str) -> bool:
        return source in ("-", DEFAULT_CORPUS) or source.startswith(HUB)

    return [s if anywhere(s) and not Path(s).exists() else str(Path(s).absolute()) for s in sources]


# ---------------------------------------------------------------------------------------------------- building


def build_tokens(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 2048,
    seed: int = 0,
    console: Console | None = None,
) -> TokenFolder:
    """Hold documents out, make a tokenizer, tokenize the rest into the new folder ``out``.

    Up to 64 MiB of text are split as :func:`hla.data.split_documents` does, so that a run on the folder is the run on
    the text. Of more text, candidates are drawn by ``seed`` until they hold 1 MiB, and those that turn out to be
    near-duplicates of a training document are in neither part; the BPE is trained on a sample of 64 MiB.

    Args:
        sources: see :func:`hla.data.stream_documents`; read two or three times, so not standard input.
        tokenizer: ``"bpe"``, ``"bytes"``, or a folder of tokens or a model to take it from.
        console: where the progress bar is shown (default: standard error).

    Raises:
        HLAError: ``out`` exists, a source cannot be read, or nothing can be held out.
    """
    if "-" in sources:
        raise HLAError("standard input can be read only once: put the text into a file first")
    if out.exists():
        raise HLAError(f"the output {str(out)!r} exists already: choose a new name")
    if tokenizer not in ("bpe", "bytes") and not Path(tokenizer).is_dir():
        raise HLAError(f"unknown tokenizer {tokenizer!r}: choose 'bpe', 'bytes' or a folder that has one")
    draft = out.absolute().parent / f".{out.absolute().name}.building"
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        with Progress(*columns, console=console or Console(stderr=True)) as bar:
            text = _Text(sources, bar)
            held, train, excluded, largest = _split(text, seed)
            if tokenizer in ("bpe", "bytes"):
                sample = text.sample(seed, held) if tokenizer == "bpe" else ()
                made = build_tokenizer(tokenizer, vocab_size, sample if train is None else train)
            else:
                made = load_tokenizer(Path(tokenizer))
            if train is not None:
                facts = _write(draft, made, bar.track(train, description="tokenizing"))
            else:
                candidates = [d for i, d in enumerate(text.read("reading candidates")) if i in held]
                similarity = Similarity(candidates)
                facts = _write(draft, made, text.training(held, similarity))
                new = [value < NEAR_DUPLICATE for value in similarity.largest]
                excluded = new.count(False)
                largest = max((v for v in similarity.largest if v < NEAR_DUPLICATE), default=0.0)
                held_out = [d for d, keep in zip(candidates, new, strict=True) if keep]
                if not held_out:
                    raise HLAError(
                        f"no document can be held out: all {excluded} candidates are near-duplicates of training "
                        "documents; give more varied text or another --seed"
                    )
                held = dict(enumerate(held_out))
        held_out = list(held.values())
        made.save_pretrained(draft)
        with (draft / "held_out.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(d._asdict()) + "\n" for d in held_out)
        index = {
            "format": FORMAT,
            "sources": absolute_sources(sources or (DEFAULT_CORPUS,)),
            "seed": seed,
            **facts,
            "held_out": {
                "documents": len(held_out),
                "bytes": sum(d.size for d in held_out),
                "sha256": fingerprint(held_out),
                "excluded": excluded,
                "largest_similarity": largest,
            },
        }
        (draft / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in [*draft.iterdir(), draft]:
            flush(path)
        os.rename(draft, out)
    except OSError as error:
        raise HLAError(f"cannot write {str(out)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return open_tokens(out)


class _Text:
    """Documents that are read again and again from where they are."""

    def __init__(self, sources: Sequence[str], bar: Progress) -> None:
        self.sources, self.bar = sources, bar
        task = bar.add_task("reading", total=None)
        sizes = []
        for document in stream_documents(sources):
            sizes.append(document.size)
            bar.update(task, description=f"reading: {len(sizes):,} documents")
        bar.update(task, total=1, completed=1)
        self.sizes = np.array(sizes, np.int64)
        self.total = int(self.sizes.sum())

    def read(self, description: str) -> Iterator[Document]:
        task = self.bar.add_task(description, total=self.total)
        for i, document in enumerate(stream_documents(self.sources)):
            if i >= len(self.sizes) or document.size != self.sizes[i]:
                raise HLAError(f"{document.name} has changed while it was read")
            yield document
            self.bar.advance(task, document.size)

    def draw(self, seed: int, limit: int, largest: int, without: Iterable[int] = ()) -> set[int]:
        """Documents drawn by ``seed`` until they hold ``limit`` bytes; none above ``largest`` bytes."""
        order = np.random.default_rng(seed).permutation(len(self.sizes))
        order = order[self.sizes[order] <= largest]
        order = order[~np.isin(order, list(without))]
        count = int(np.searchsorted(np.cumsum(self.sizes[order]), limit)) + 1
        return set(order[:count].tolist())

    def sample(self, seed: int, without: Iterable[int]) -> Iterator[Document]:
        """Documents of about 64 MiB; long ones too, for they may be all there is."""
        chosen = self.draw(seed, IN_MEMORY, self.total, without)
        return (d for i, d in enumerate(self.read("training the tokenizer")) if i in chosen)

    def training(self, held: Iterable[int], similarity: Similarity) -> Iterator[Document]:
        held = set(held)
        for i, document in enumerate(self.read("tokenizing")):
            if i not in held:
                similarity.compare(document)
                yield document


def _split(text: _Text, seed: int) -> tuple[dict[int, Any], list[Document] | None, int, float]:
    """(held out, training documents or None if they are too many, excluded, largest similarity).

    Of large text, what is held out is the number of each candidate; which of them are new is not known yet.
    """
    if text.total <= IN_MEMORY:
        split = split_documents(list(text.read("reading again")), seed)
        return dict(enumerate(split.held_out)), split.train, len(split.excluded), split.largest_similarity
    held = text.draw(seed, HELD_OUT_BYTES, 2 * HELD_OUT_BYTES)
    if not held:
        raise HLAError(
            f"no document has less than {2 * HELD_OUT_BYTES:,} bytes, so none can be held out: cut the text up"
        )
    return dict.fromkeys(held), None, 0, 0.0


def _write(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]) -> dict[str, Any]:
    """Tokenize documents into tokens.bin and starts.npy; returns their part of the index."""
    end = tokenizer.eos_token_id
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    plain = plain_tokenizer(tokenizer)
    digest = hashlib.sha256()
    starts: list[int] = []
    count = size = 0
    with (folder / "tokens.bin").open("wb") as file:

        def put(ids: list[int]) -> None:
            data = np.array(ids, dtype).tobytes()
            digest.update(data)
            file.write(data)

        for group in _groups(documents):
            size += sum(d.size for d in group)
            for encoding in plain.encode_batch([d.text for d in group], add_special_tokens=False):  # on all cores
                starts.append(count)
                put([end, *encoding.ids])
                count += 1 + len(encoding.ids)
        put([end])
    np.save(folder / "starts.npy", np.array(starts, np.int64))
    return {
        "documents": len(starts),
        "bytes": size,
        "tokens": count,
        "dtype": dtype.name,
        "sha256": digest.hexdigest(),
    }


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of some size, for what has to be set up once per list."""
    group: list[Document] = []
    length = 0
    for document in documents:
        group.append(document)
        length += len(document.text)
        if length >= GROUP:
            yield group
            group, length = [], 0
    if group:
        yield group


# ---------------------------------------------------------------------------------------------------- reading


def open_tokens(folder: Path) -> TokenFolder:
    """Map a folder of tokens into memory.

    Raises:
        HLAError: a file is missing or not what the index says.
    """
    damaged = f"the folder of tokens {str(folder)!r} is damaged"
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise HLAError(f"the folder of tokens {str(folder)!r} was written by another release of this library")
        dtype, count = np.dtype(index["dtype"]), index["tokens"]
        if (folder / "tokens.bin").stat().st_size != (count + 1) * dtype.itemsize:
            raise HLAError(f"{damaged}: tokens.bin does not have the {count + 1:,} tokens it should have")
        tokens = np.memmap(folder / "tokens.bin", dtype, "r")
        starts = np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False)
        with (folder / "held_out.jsonl").open(encoding="utf-8") as lines:
            held_out = [Document(**json.loads(line)) for line in lines]
        expected, digest = index["held_out"], index["sha256"]
        if fingerprint(held_out) != expected["sha256"]:
            raise HLAError(f"{damaged}: held_out.jsonl has changed")
        description = (
            f"{index['documents']:,} documents ({index['bytes']:,} bytes, {count:,} tokens) to train on, "
            f"{expected['documents']} ({expected['bytes']:,} bytes) held out. Check for near-duplicates (similarity "
            f"{NEAR_DUPLICATE} or more): {expected['excluded']} documents excluded, largest similarity of held-out to "
            f"training text {expected['largest_similarity']:.3f}."
        )
    except OSError as error:
        raise HLAError(f"{damaged}: {error.strerror or error} ({Path(error.filename or '').name})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HLAError(f"{damaged}: one of its files is not what it should be") from error
    return TokenFolder(load_tokenizer(folder), TokenStream(tokens, starts), held_out, digest, description)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer in a folder of tokens or of a model.

    Raises:
        HLAError: there is none, or it is not byte-level, or it has no id for the end of a document.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise HLAError(
            f"cannot load the tokenizer of {str(folder)!r}: {str(error).strip().split(chr(10))[0]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise HLAError(f"the tokenizer of {str(folder)!r} has no eos_token, which ends a document")
    token_bytes(tokenizer)
    return tokenizer
