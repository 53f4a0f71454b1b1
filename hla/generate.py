"""Text from a model, token by token, in memory that does not grow with its length."""

from __future__ import annotations

import codecs
import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hla.data import encode_text, token_bytes
from hla.engine import Engine as Engine
from hla.engine import Request as Request
from hla.errors import HLAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from hla.models import HLACache

# Tokens of a prompt that go through the model at once: what they need meanwhile is all the memory that reading takes.
PIECE = 2048


def check_sampling(*, max_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse values that mean nothing.

    Raises:
        HLAError: max_tokens < 1, temperature negative or not finite, top_k < 1, or top_p outside (0, 1].
    """
    if max_tokens < 1:
        raise HLAError(f"max_tokens must be at least 1, not {max_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise HLAError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k is not None and top_k < 1:
        raise HLAError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise HLAError(f"top_p must be above 0 and at most 1, not {top_p}")


def read(
    model: PreTrainedModel,
    ids: Sequence[int] | Tensor,
    *,
    cache: Any = None,
    piece: int = PIECE,
    snapshots: Snapshots | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Any, Tensor]:
    """Read tokens in pieces, so that the memory for it does not grow with their number.

    Pieces end where the position in the text is a multiple of ``piece`` (and of ``snapshots.every``), wherever reading
    began: what was read in two calls is to the bit what is read in one, if the first call ended at such a place.

    Args:
        model: a causal language model of Hugging Face's interface.
        ids: the tokens, at least one; or int64 ``[B, T]`` for B sequences.
        cache: what to go on from; by default the beginning.
        piece: most tokens to read at once.
        snapshots: is told of every piece.
        progress: called after every piece with the number of tokens read so far.

    Returns:
        (the cache after the last token, logits ``[B, vocabulary]`` of the next one). An `HLACache` holds the logits
        too, as ``next_logits``.

    Raises:
        HLAError: there are no tokens, or the cache is a state of another model.
        ValueError: piece < 1.
    """
    from hla.models import HLACache, HLAPreTrainedModel

    if piece < 1:
        raise ValueError(f"piece must be at least 1, got {piece}")
    device = next(model.parameters()).device
    tokens = ids.to(device) if isinstance(ids, Tensor) else torch.tensor([list(ids)], device=device)
    if not tokens.numel():
        raise HLAError("the prompt is empty")
    if cache is None and isinstance(model, HLAPreTrainedModel):
        cache = HLACache(model.config)
    position = 0 if cache is None else int(cache.get_seq_length())
    if snapshots is not None:
        snapshots.begin(cache)
    return _read(model, tokens, cache, position, piece, snapshots, progress)


def _read(
    model: PreTrainedModel,
    tokens: Tensor,
    cache: Any,
    begin: int,
    piece: int,
    snapshots: Snapshots | None,
    progress: Callable[[int], None] | None,
) -> tuple[Any, Tensor]:
    """`read` from a known position on (asking the cache for it waits for a GPU, and not every cache knows)."""
    steps = [piece] if snapshots is None else [piece, snapshots.every]
    position, end = begin, begin + tokens.shape[1]
    while position < end:
        border = min(end, *((position // step + 1) * step for step in steps))
        part = tokens[:, position - begin : border - begin]
        with torch.inference_mode():
            out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits, position = out.past_key_values, out.logits[:, -1], border
        if hasattr(cache, "next_logits"):
            cache.next_logits = logits
        if snapshots is not None:
            snapshots.add(part, cache)
        if progress is not None:
            progress(position - begin)
    return cache, logits


def stream(
    model: PreTrainedModel,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    cache: Any = None,
    snapshots: Snapshots | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids that follow ``ids``, each as soon as it is drawn; ends after ``eos_token_id``.

    The id yielded last is not in the cache yet: `read` it, to save a state or to go on with other tokens.

    Args:
        model: a causal language model of Hugging Face's interface.
        ids: the prompt, at least one id; with a cache that has ``next_logits`` it may be empty.
        temperature: divides the logits; 0 takes the most likely id.
        top_k, top_p: draw only from the k likeliest ids, from the likeliest ids that hold the share p.
        seed: makes the draw repeatable. What is drawn at a position depends on the seed, the position and the
            probabilities alone, so that a text that was interrupted goes on, with the same seed, as it would have.
        cache: what to go on from, changed in place (``cache.copy()`` keeps it); None is the beginning.
        snapshots: is told of every token read.
        progress: called while the prompt is read, see `read`.

    Raises:
        HLAError: values that mean nothing, an empty prompt with nothing to go on from, or a state of another model.
    """
    check_sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    end = model.config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    position = len(ids) + (0 if cache is None else int(cache.get_seq_length()))
    if len(ids):
        cache, logits = read(model, ids, cache=cache, snapshots=snapshots, progress=progress)
    elif getattr(cache, "next_logits", None) is not None:
        cache.check(model)
        logits = cache.next_logits.to(next(model.parameters()).device)
        if snapshots is not None:
            snapshots.begin(cache)
    else:
        raise HLAError("the prompt is empty")
    if logits.shape[0] != 1:
        raise HLAError(f"the cache holds {logits.shape[0]} sequences; one can be streamed")
    generator = torch.Generator(logits.device)
    if seed is None:
        generator.seed()
    for count in range(1, max_tokens + 1):
        if seed is not None:
            generator.manual_seed(seed_at(seed, position))
        drawn = sample(logits.float(), temperature, top_k, top_p, generator)[:, None]
        token = int(drawn)
        yield token
        if token in ends or count == max_tokens:
            return
        cache, logits = _read(model, drawn, cache, position, 1, snapshots, None)
        position += 1


def seed_at(seed: int, position: int) -> int:
    """The seed of the draw at a position of a text: 64 bits that look unrelated for any two pairs."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest(), "little")


def sample(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> torch.Tensor:
    """Draw an id for each row of ``logits`` [B, vocabulary]; returns int64 [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # an id stays while the likelier ones hold less than p: the first always
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class Snapshots:
    """States at every ``every``-th token of one text, to step back to an earlier position without reading it all again.

    Given to `read` and `stream`, which take a snapshot where they begin and wherever the position is a multiple of
    ``every``. `step_back` reads at most ``every - 1`` tokens again. A snapshot takes ``cache.nbytes()`` of memory (the
    same at every position, unless there are softmax layers, whose keys and values it copies), the logits of one token
    beside it, and every token 8 bytes. With ``files`` the snapshots are files of `HLACache.save` instead.

    Args:
        every: tokens between snapshots.
        keep: how many there may be; the oldest one goes first. None keeps all.
        files: the beginning of their names, to which the position is added: ``book.state.000004096``.

    Raises:
        ValueError: every or keep below 1.
    """

    def __init__(self, every: int, keep: int | None = 8, files: str | Path | None = None) -> None:
        if every < 1 or (keep is not None and keep < 1):
            raise ValueError(f"every and keep must be at least 1, got {every} and {keep}")
        self.every, self.keep, self.files = every, keep, files
        self._first: int | None = None  # the position where the ids begin
        self._ids = array("q")
        self._states: dict[int, HLACache | Path | None] = {}  # by position, ascending; None is the empty state

    @property
    def position(self) -> int:
        """Tokens of the text so far."""
        return (self._first or 0) + len(self._ids)

    @property
    def positions(self) -> list[int]:
        """Where there are snapshots, ascending."""
        return list(self._states)

    def begin(self, cache: HLACache | None) -> None:
        """Called before tokens are read. Raises ValueError for a cache that is not where these snapshots are."""
        at = 0 if cache is None else int(cache.get_seq_length())
        if self._first is None:
            self._first = at
            self._states[at] = cache.copy() if cache is not None and at else None
        if at != self.position:
            raise ValueError(f"these snapshots follow another text: it is at token {self.position}, the cache at {at}")

    def add(self, ids: Tensor, cache: HLACache) -> None:
        """Called after ``ids [1, T]`` were read. Raises ValueError for several rows or a cache of another kind."""
        if ids.shape[0] != 1 or not hasattr(cache, "next_logits"):
            raise ValueError("snapshots are of one sequence in an HLACache")
        self._ids.extend(ids[0].tolist())
        if self.position % self.every:
            return
        if self.files is None:
            self._states[self.position] = cache.copy()
        else:
            path = Path(f"{self.files}.{self.position:09d}")
            cache.save(path)
            self._states[self.position] = path
        while self.keep is not None and len(self._states) > self.keep:
            self._drop(next(iter(self._states)))

    def step_back(self, model: PreTrainedModel, position: int, piece: int = PIECE) -> HLACache:
        """A cache as it was after ``position`` tokens; everything after it is forgotten here too.

        It equals what reading these tokens anew would give: to the bit if they were read with the same ``piece``, to
        rounding where they had been written one by one.

        Raises:
            HLAError: that position is after the last token or before the first snapshot.
        """
        from hla.models import HLACache

        if position > self.position or not (at := [p for p in self._states if p <= position]):
            first = min(self._states, default=0)
            raise HLAError(f"cannot step back to token {position}: there are snapshots for {first} to {self.position}")
        state = self._states[at[-1]]
        if isinstance(state, Path):
            cache = HLACache.load(state, model)
        else:
            config: Any = model.config
            cache = HLACache(config) if state is None else state.copy()
        assert self._first is not None
        again = self._ids[at[-1] - self._first : position - self._first]
        if again:
            cache, _ = read(model, again, cache=cache, piece=piece)
        for p in [p for p in self._states if p > position]:
            self._drop(p)
        del self._ids[position - self._first :]
        return cache

    def _drop(self, position: int) -> None:
        if isinstance(state := self._states.pop(position), Path):
            state.unlink(missing_ok=True)


class TextDecoder:
    """Turns ids into text as they come: whole characters only, and nothing of a stop string.

    ``feed`` returns the text that is now certain; ``stopped`` says whether a stop string was met; ``close`` returns
    what was held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise HLAError("a stop string is empty")
        self._bytes = token_bytes(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = list(stop)
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Text that became certain with this id (may be empty)."""
        if self.stopped:
            return ""
        self._held += self._utf8.decode(self._bytes[token] if token < len(self._bytes) else b"")
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def close(self) -> str:
        """What was held back: the beginning of a stop string that did not go on, or an unfinished character."""
        text = "" if self.stopped else self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next(n for n in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:n]))


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, begins: bool = True) -> list[int]:
    """The ids of a prompt as the beginning of a document or, if it does not begin one, of what follows in it.

    Raises:
        HLAError: the prompt is empty.
    """
    if not prompt:
        raise HLAError("the prompt is empty")
    (ids,) = encode_text(tokenizer, [prompt])
    return [tokenizer.eos_token_id, *ids] if begins else list(ids)
