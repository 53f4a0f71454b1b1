"""How well a model predicts text: nats per token, perplexity and bits per byte; and what compressors make of it."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from hla import sources
from hla.data import Document, TokenStream, fingerprint
from hla.errors import HLAError
from hla.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Evaluation:
    """Sums over scored tokens; ``bytes`` is the exact length of the text they spell (document ends: 0 bytes)."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of :attr:`loss`, per token: comparable only between models with the same tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits to code a byte of the text, document ends included: comparable between all models and compressors."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        """The numbers as written to JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


Piece = tuple[int, int, int]  # start, length, skip


def windows(stream: TokenStream, context: int, stride: int) -> list[Piece]:
    """Pieces of the stream of at most ``context`` tokens that together score every token once.

    No piece crosses a document border; all but a document's first piece look back at least ``context - stride``
    tokens before the first prediction that they score (``skip`` of them were scored by the piece before).
    """
    pieces: list[Piece] = []
    ends = [*stream.starts[1:].tolist(), len(stream)]
    for first, end in zip(stream.starts.tolist(), ends, strict=True):
        start, scored = first, first
        while scored < end:
            stop = min(start + context, end)
            pieces.append((start, stop - start, scored - start))
            scored = stop
            start += stride
    return pieces


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    stream: TokenStream,
    sizes: Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    rows: int = 8,
    max_windows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Score every token of ``stream`` once (or those of about ``max_windows`` windows spread evenly over it).

    Args:
        model: a causal language model; its training mode is left as found.
        stream: the text, tokenized as the model's training text was.
        sizes: bytes that each id stands for.
        context: window length in tokens.
        stride: how far windows are apart, at most ``context`` (default: three quarters of it).
        rows: windows of full length per batch.
        dtype: bfloat16 turns on autocast.

    Raises:
        HLAError: the model's output is not finite.
    """
    pieces = windows(stream, context, stride or context - context // 4)
    if max_windows is not None and len(pieces) > max_windows:
        pieces = [pieces[i * len(pieces) // max_windows] for i in range(max_windows)]
    pieces.sort(key=lambda piece: piece[1])  # batches of one length are quicker
    table = np.asarray(sizes, np.int64)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    try:
        for group in _groups(pieces, rows * context):
            batch = stream.pack([(start, length) for start, length, _ in group])
            kept = torch.cat([torch.arange(length) >= skip for _, length, skip in group])
            targets = batch.targets[0, kept]
            size += int(table[targets.numpy()].sum())
            tokens += len(targets)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(**batch.inputs(device), use_cache=False).logits.flatten(0, 1)
            logits = logits[kept.to(device)].float()
            nats += F.cross_entropy(logits, targets.to(device), reduction="sum").item()
    finally:
        model.train(was_training)
    if not math.isfinite(nats):
        raise HLAError("the model's predictions are not finite numbers: its weights are broken")
    return Evaluation(nats, tokens, size)


def _groups(pieces: list[Piece], limit: int) -> Iterator[list[Piece]]:
    """Consecutive pieces of together at most ``limit`` tokens (or one piece)."""
    group: list[Piece] = []
    filled = 0
    for piece in pieces:
        if group and filled + piece[1] > limit:
            yield group
            group, filled = [], 0
        group.append(piece)
        filled += piece[1]
    if group:
        yield group


def held_out_documents(training: dict[str, Any], folder: str | Path) -> list[Document]:
    """The documents held out when the model in ``folder`` was trained, found again from what training.json says.

    Raises:
        HLAError: there is no such record, the data came from standard input, or the files have changed since.
    """
    try:
        settings = training["config"]
        config = TrainConfig(
            data=tuple(settings["data"]), weights=tuple(settings.get("weights", ())), seed=settings["seed"]
        )
        expected = training["held_out"]["sha256"]
    except (KeyError, TypeError) as error:
        raise HLAError(f"{str(folder)!r} does not say what it was trained on: name the text to evaluate") from error
    if "-" in config.data:
        raise HLAError(f"{str(folder)!r} was trained on standard input: name the text to evaluate")
    held_out = sources.held_out_documents(config)
    if fingerprint(held_out) != expected:
        raise HLAError(f"the training data of {str(folder)!r} has changed since: name the text to evaluate")
    return held_out


def read_reference(path: Path, digest: str) -> tuple[str, float, int | None]:
    """(name, bits per byte, training tokens) from a result of ``hla evaluate --json`` on text with this fingerprint.

    Raises:
        HLAError: the file is missing, not such a result, or about other text.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, value, text = str(content["name"]), float(content["bits_per_byte"]), content["text_sha256"]
        tokens = content["trained"]["tokens"]
    except OSError as error:
        raise HLAError(f"cannot read the reference {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HLAError(f"{str(path)!r} is not a result written by hla evaluate --json") from error
    if text != digest:
        raise HLAError(f"{str(path)!r} is a result on other text than the one evaluated here")
    return name, value, tokens


def compressors(documents: Sequence[Document]) -> dict[str, float]:
    """Bits per byte of general-purpose compressors on all documents in one piece."""
    data = b"".join(d.text.encode() for d in documents)
    packed = {
        "gzip -9": gzip.compress(data, compresslevel=9, mtime=0),
        "xz -9": lzma.compress(data, preset=9),
    }
    return {name: 8 * len(out) / len(data) for name, out in packed.items()}
