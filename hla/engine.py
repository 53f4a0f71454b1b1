"""Generation for many requests that come and go: slots of one fixed state, one model call per token for all of them.

A request is a row of a state of constant size: to admit one is to write a row, to finish it is to forget which. While
decoding, the model always sees the same call, ``[slots, 1]`` tokens with states at fixed addresses, so it can be
captured once as a CUDA graph; and as no row reads another, a request gets the same logits in any company.

Prompts are read between decoding steps, in pieces and in a state of their own, which is copied into the slot at the
end. The last token of a prompt is left to the decoding step, where its logits give the first new token like any other.
"""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hla.errors import HLAError
from hla.layer_state import copy_state, map_state, state_tensors

if TYPE_CHECKING:
    from hla.models import HLACache, HLAForCausalLM


@dataclass(eq=False)
class Request:
    """What `Engine.submit` returns, for reading.

    id: counts the requests of an engine from 0.
    status: "waiting" for a slot, "prefilling" (its prompt is being read), "running", "finished" or "cancelled".
    finish_reason: "eos" (a stop id came), "length" (max_tokens reached), "cancelled", or None as long as it lives.
    tokens: the new ids so far, the stop id too.
    """

    id: int
    prompt: list[int] = field(repr=False)
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop_ids: frozenset[int]
    status: Literal["waiting", "prefilling", "running", "finished", "cancelled"] = "waiting"
    finish_reason: Literal["eos", "length", "cancelled"] | None = None
    tokens: list[int] = field(default_factory=list)
    _random: random.Random = field(default_factory=random.Random, repr=False)
    _cache: HLACache | None = field(default=None, repr=False)
    _prefilled: int = field(default=0, repr=False)

    @property
    def done(self) -> bool:
        """Whether it is finished or cancelled."""
        return self.finish_reason is not None


class Engine:
    """Continuous batching of an `HLAForCausalLM` without softmax layers.

    Memory for ``slots + 1`` states is allocated here and never grows; waiting requests hold their prompts. They are
    admitted in the order they came. Not thread-safe: one thread submits, steps and cancels.

    Args:
        model: in evaluation mode. Its weights may change in place, but must not move while the engine lives.
        slots: requests that run at the same time.
        prefill_chunk: the most prompt tokens that are read between two decoding steps, and the length of the pieces in
            which a prompt is read: large is fast, small keeps running requests from waiting.
        compile: decode through ``torch.compile(model, fullgraph=True)``.
        cuda_graph: capture the decoding call in a CUDA graph; None captures on CUDA devices.

    Raises:
        HLAError: slots or prefill_chunk < 1, a model that is no HLAForCausalLM, has softmax layers or is in training
            mode, or a CUDA graph on another device.
    """

    def __init__(
        self,
        model: HLAForCausalLM,
        slots: int = 16,
        *,
        prefill_chunk: int = 256,
        compile: bool = False,
        cuda_graph: bool | None = None,
    ) -> None:
        from hla.models import HLAForCausalLM  # transformers, which `import hla.generate` does not need

        if not isinstance(model, HLAForCausalLM):
            raise HLAError(f"the engine needs an HLAForCausalLM, not {type(model).__name__}")
        if "full_attention" in model.config.layer_types:
            raise HLAError("the engine needs a model of HLA layers only; this one has softmax (full_attention) layers")
        if model.training:
            raise HLAError("the model is in training mode: call model.eval() first")
        for name, value in (("slots", slots), ("prefill_chunk", prefill_chunk)):
            if not isinstance(value, int) or value < 1:
                raise HLAError(f"{name} must be a whole number of at least 1, not {value!r}")
        self.device, self.vocab_size = model.device, model.config.vocab_size
        cuda = self.device.type == "cuda"
        if cuda_graph and not cuda:
            raise HLAError(f"a CUDA graph needs a model on a CUDA device, and this one is on {self.device}")
        self.slots, self.prefill_chunk = slots, prefill_chunk
        self._model = model
        self._states, self._prompt_state = _allocate(model, slots), _allocate(model, 1)
        with torch.inference_mode(False):  # ordinary tensors, whatever mode the engine is made in
            self._tokens = torch.zeros(slots, 1, dtype=torch.int64, device=self.device)
        self._waiting: deque[Request] = deque()
        self._slots: list[Request | None] = [None] * slots
        self._prefilling: Request | None = None
        self._submitted = 0
        self._call: Callable[..., Any] = torch.compile(model, fullgraph=True) if compile else model
        self._decode: Callable[[], Tensor] = self._forward
        with torch.inference_mode():
            if cuda if cuda_graph is None else cuda_graph:
                self._decode = self._capture()
            elif compile:
                self._forward()  # compiles now, not while requests wait

    def submit(
        self,
        ids: Iterable[int] | Tensor,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        cache: HLACache | None = None,
    ) -> Request:
        """Put a request into the queue; `step` works on it.

        Args:
            ids: the prompt, at least one id (with a cache: what follows the tokens that the cache has seen).
            max_tokens: new tokens at most.
            temperature: divides the logits; 0 takes the most likely id.
            top_k, top_p: draw only from the k likeliest ids, from the likeliest ids that hold the share p.
            seed: makes the draw repeatable, in any company; it is not that of `hla.generate.stream`.
            stop_ids: ids that end the request, itself included; None takes the model's ``eos_token_id``.
            cache: a state to start from (batch 1), such as that of a system prompt. It is read when the request leaves
                the queue and never written, so many requests may share it; leave it as it is until then.

        Raises:
            HLAError: an empty prompt, ids that are no integers or outside the vocabulary, sampling values that mean
                nothing, or a cache of another kind, model or batch size.
        """
        from hla.generate import check_sampling  # which offers this module's classes

        check_sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        prompt = self._check_ids("ids", ids)
        if not prompt:
            raise HLAError("the prompt is empty")
        if stop_ids is None:
            end = self._model.config.eos_token_id
            stop_ids = end if isinstance(end, list) else [] if end is None else [end]
        if cache is not None:
            self._check_cache(cache)
        request = Request(
            self._submitted, prompt, max_tokens, temperature, top_k, top_p,
            frozenset(self._check_ids("stop_ids", stop_ids)), _random=random.Random(seed), _cache=cache,
        )  # fmt: skip
        self._submitted += 1
        self._waiting.append(request)
        return request

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """Read at most ``prefill_chunk`` tokens of prompts, then decode a token of every running request.

        Returns:
            (request, new token) of each, the token being also the last of ``request.tokens``. Empty while there is
            nothing to decode yet.
        """
        self._prefill()
        running = [(i, r) for i, r in enumerate(self._slots) if r is not None and r.status == "running"]
        if not running:
            return []
        newest = [0] * self.slots  # free slots compute something from 0, which nobody reads
        for i, request in running:
            newest[i] = (request.tokens or request.prompt)[-1]
        self._tokens.copy_(torch.tensor(newest)[:, None], non_blocking=True)
        logits = self._decode()
        if warm := [(i, r) for i, r in running if r.temperature > 0]:
            rows = torch.zeros(4, self.slots)  # a temperature of 0 for all others
            for i, r in warm:
                uniform = 1 - r._random.random()
                rows[:, i] = torch.tensor([r.temperature, r.top_k or self.vocab_size, r.top_p or 1, uniform])
            drawn = sample_rows(logits, *rows.to(self.device, non_blocking=True))
        else:
            drawn = logits.argmax(-1)
        tokens = drawn.tolist()  # the one place where the host waits for the device
        for i, request in running:
            request.tokens.append(tokens[i])
            if tokens[i] in request.stop_ids:
                self._end(request, "eos")
            elif len(request.tokens) >= request.max_tokens:
                self._end(request, "length")
        return [(request, tokens[i]) for i, request in running]

    def cancel(self, request: Request) -> None:
        """End a request, in whatever state; its slot is free at the next step. One that has ended stays as it is.

        Raises:
            HLAError: a request of another engine.
        """
        if request.done:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        elif request not in self._slots:
            raise HLAError("the request belongs to another engine")
        self._end(request, "cancelled")

    @property
    def idle(self) -> bool:
        """Whether no request is waiting, prefilling or running."""
        return not self._waiting and all(request is None for request in self._slots)

    def __iter__(self) -> Iterator[tuple[Request, int]]:
        """(request, new token) as they come, until the engine is idle; more may be submitted meanwhile."""
        while not self.idle:
            yield from self.step()

    def run(self) -> None:
        """Step until the engine is idle."""
        while not self.idle:
            self.step()

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of one request as they come; the others advance with it."""
        sent = 0
        while sent < len(request.tokens) or not request.done:
            if sent < len(request.tokens):
                yield request.tokens[sent]
                sent += 1
            elif self.idle:
                raise HLAError("the request belongs to another engine")
            else:
                self.step()

    def nbytes(self) -> int:
        """Bytes of all states, the same from the first request to the last."""
        return self._states.nbytes() + self._prompt_state.nbytes()

    def _prefill(self) -> None:
        """Admits requests and reads their prompts, `prefill_chunk` tokens at most."""
        budget = self.prefill_chunk
        while True:
            if self._prefilling is None:
                if not self._waiting or None not in self._slots:
                    return
                self._begin(self._waiting.popleft())
            request = self._prefilling
            assert request is not None
            # Cut at fixed places: how a prompt is rounded must not depend on what else is read in the same step.
            start, last = request._prefilled, len(request.prompt) - 1
            piece = request.prompt[start : min(start + self.prefill_chunk, last)]
            if len(piece) > budget:
                return
            if piece:
                ids = torch.tensor([piece]).to(self.device, non_blocking=True)
                self._model.model(input_ids=ids, past_key_values=self._prompt_state, use_cache=True)
                budget -= len(piece)
                request._prefilled += len(piece)
            if request._prefilled == last:
                slot = self._slots.index(request)
                for states, new in zip(self._states.layers, self._prompt_state.layers, strict=True):
                    copy_state(map_state(lambda x: x[slot : slot + 1], states.state), new.state)  # noqa: B023
                request.status, self._prefilling = "running", None

    def _begin(self, request: Request) -> None:
        """Gives a request a slot, and its prompt the state to be read in."""
        self._slots[self._slots.index(None)] = request
        self._prefilling, request.status = request, "prefilling"
        self._prompt_state.reset()
        if request._cache is not None:
            for mine, given in zip(self._prompt_state.layers, request._cache.layers, strict=True):
                copy_state(mine.state, given.state)
            request._cache = None

    def _end(self, request: Request, reason: Literal["eos", "length", "cancelled"]) -> None:
        request.status = "cancelled" if reason == "cancelled" else "finished"
        request.finish_reason, request._cache = reason, None
        if request is self._prefilling:
            self._prefilling = None
        if request in self._slots:
            self._slots[self._slots.index(request)] = None

    def _forward(self) -> Tensor:
        """Advances every slot by its entry of `_tokens`; logits ``[slots, vocabulary]`` in float32."""
        out = self._call(input_ids=self._tokens, past_key_values=self._states, use_cache=True)
        return out.logits[:, -1].float()

    def _capture(self) -> Callable[[], Tensor]:
        """`_forward` as a CUDA graph. It writes its logits to the same place every time."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels compile and libraries allocate before the capture, not in it
                for _ in range(3):
                    self._forward()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _check_ids(self, name: str, ids: Iterable[int] | Tensor) -> list[int]:
        try:
            ids = [operator.index(x) for x in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        except TypeError:
            raise HLAError(f"{name} must be a flat sequence of token ids, not {type(ids).__name__}") from None
        wrong = [x for x in ids if not 0 <= x < self.vocab_size]
        if wrong:
            raise HLAError(f"{name} holds {wrong[0]}, which is outside the vocabulary of {self.vocab_size} ids")
        return ids

    def _check_cache(self, cache: HLACache) -> None:
        if not isinstance(cache, type(self._states)):
            raise HLAError(f"cache must be an HLACache, not {type(cache).__name__}")
        if not cache.is_initialized:
            raise HLAError("the cache is empty: let the model read something with it first")
        shapes = [
            [x.shape[1:] for layer in c.layers for x in state_tensors(layer.state)] if all(c.is_linear) else None
            for c in (cache, self._states)
        ]
        if shapes[0] != shapes[1]:
            raise HLAError("the cache belongs to a model of another shape")
        if cache.layers[0].batch_size != 1:
            raise HLAError(f"the cache holds {cache.layers[0].batch_size} sequences; a request goes on from one")
        cache.check(self._model)  # one that comes from a file says which model made it


def _allocate(model: HLAForCausalLM, batch: int) -> HLACache:
    """A cache with its tensors."""
    from hla.models import HLACache

    cache = HLACache(model.config)
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        layer.prepare(block.mixer, torch.zeros(batch, 1, 0, device=block.mixer.o_proj.weight.device))
    return cache


def sample_rows(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draw an id for each row of ``logits`` [B, vocabulary], each with its own settings ``[B]``; returns int64 [B].

    The likeliest ids come first; the drawn one is where their cumulative share reaches ``uniform``, in (0, 1]: a row
    needs one random number, which its request brings along. A temperature of 0 takes the most likely id.
    """
    warm = temperature > 0
    scaled = logits / torch.where(warm, temperature, 1.0)[:, None]
    shares, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    shares = shares * (torch.arange(shares.shape[1], device=shares.device) < top_k[:, None])
    cumulative = shares.cumsum(-1)
    outside = (top_p[:, None] < 1) & (cumulative - shares >= top_p[:, None] * cumulative[:, -1:])
    shares = shares.masked_fill(outside, 0.0)  # the first id always stays
    cumulative = shares.cumsum(-1)
    at = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return torch.where(warm, ids.gather(-1, at)[:, 0], logits.argmax(-1))
