"""Text from a model, token by token, in memory that does not grow with its length."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hla.data import encode_text, token_bytes
from hla.errors import HLAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


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
) -> Iterator[int]:
    """Yield up to ``max_tokens`` ids that follow ``ids``, each as soon as it is drawn; ends after ``eos_token_id``.

    Args:
        model: a causal language model of Hugging Face's interface.
        ids: the prompt, at least one id.
        temperature: divides the logits; 0 takes the most likely id.
        top_k, top_p: draw only from the k likeliest ids, from the likeliest ids that hold the share p.
        seed: makes the draw repeatable.
        cache: a fresh cache to use, for looking into it; None lets the model make its own.
    """
    check_sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if not ids:
        raise HLAError("the prompt is empty")
    device = next(model.parameters()).device
    end = model.config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    tokens = torch.tensor([list(ids)], device=device)
    for _ in range(max_tokens):
        with torch.inference_mode():
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens = sample(out.logits[:, -1].float(), temperature, top_k, top_p, generator)[:, None]
        token = int(tokens)
        yield token
        if token in ends:
            return


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


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a prompt as the beginning of a document.

    Raises:
        HLAError: the prompt is empty.
    """
    if not prompt:
        raise HLAError("the prompt is empty")
    (ids,) = encode_text(tokenizer, [prompt])
    return [tokenizer.eos_token_id, *ids]
