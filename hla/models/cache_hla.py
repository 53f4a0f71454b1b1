"""What an HLA model keeps between calls of `generate`: a state of constant size per HLA layer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from hla.errors import HLAError
from hla.layer_state import LayerState, map_state, state_tensors
from hla.layers import HigherOrderLinearAttention
from hla.models.configuration_hla import HLAConfig
from hla.models.state_file import Fingerprint, base_of, check_model, fingerprint, read_state, write_state
from hla.ops.state import state_class


class HLACacheLayer(CacheLayerMixin):
    """The state of one HLA layer and the number of tokens it has seen.

    The tensors are allocated at the first use and then written in place, so that their addresses, and with them
    compiled decoding steps and CUDA graphs, stay valid. Only a change of the batch size replaces them.
    """

    is_compileable = True
    supports_early_init = False  # its tensors do not have the shape of keys and values

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None
        self.seen_tokens: Tensor | None = None  # int64 scalar

    def prepare(self, mixer: HigherOrderLinearAttention, hidden_states: Tensor) -> LayerState:
        """The state that continues with ``hidden_states [B, T, D]``; zeros at the first use."""
        batch = hidden_states.shape[0]
        if self.state is None:
            # Also in inference mode the tensors must be ordinary ones, which can be written outside of it later.
            with torch.inference_mode(False):
                self.state = mixer.zero_state(batch, mixer.o_proj.weight.dtype, hidden_states.device)
                self.seen_tokens = torch.zeros((), dtype=torch.int64, device=hidden_states.device)
            self.is_initialized, self.batch_size = True, batch
            self._fix_addresses()
        if batch != self.batch_size:
            raise ValueError(f"past_key_values holds {self.batch_size} sequences, the input {batch}")
        return self.state

    def get_seq_length(self) -> Any:
        """Tokens (pads too) in the state; a tensor once there are any, as in transformers' static layers."""
        return 0 if self.seen_tokens is None else self.seen_tokens

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of an attention mask over all tokens."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("an HLA layer keeps a state, no keys and values: use prepare")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("an HLA layer keeps a state, no keys and values: use prepare")

    def reset(self) -> None:
        """Back to before the first token, in the same tensors."""
        if self.state is not None and self.seen_tokens is not None:
            for x in (*state_tensors(self.state), self.seen_tokens):
                x.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues what sequence ``beam_idx[i]`` was (beam search)."""
        if self.state is not None:
            for x in state_tensors(self.state):
                x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        if self.state is not None:
            self._replace(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences with these indices (or where a mask is true)."""
        if self.state is not None:
            self._replace(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing for 0; a state cannot forget single tokens."""
        if tokens_to_remove != 0:
            raise ValueError(f"tokens_to_remove must be 0, got {tokens_to_remove}: a state cannot be cropped")

    def offload(self) -> None:
        """Stays on its device: a state is small and needed at every token."""

    def prefetch(self) -> None:
        """Stays on its device, see `offload`."""

    def nbytes(self) -> int:
        """Bytes of the state, the same for every length."""
        return 0 if self.state is None else sum(x.numel() * x.element_size() for x in state_tensors(self.state))

    def _replace(self, function: Callable[[Tensor], Tensor]) -> None:
        self.state = map_state(function, self.state)
        self.batch_size = state_tensors(self.state)[0].shape[0]
        self._fix_addresses()

    def copy(self) -> HLACacheLayer:
        """The same state in tensors of its own."""
        new = HLACacheLayer()
        if self.state is not None and self.seen_tokens is not None:
            new.fill(map_state(_own, self.state), _own(self.seen_tokens))
        return new

    def fill(self, state: LayerState, seen_tokens: Tensor) -> None:
        """Go on from this state, in these very tensors; seen_tokens is an int64 scalar."""
        self.state, self.seen_tokens = state, seen_tokens
        self.is_initialized, self.batch_size = True, state_tensors(state)[0].shape[0]
        self._fix_addresses()

    def to(self, device: torch.device) -> None:
        """Moves to another device."""
        if self.state is not None and self.seen_tokens is not None:
            self.fill(map_state(lambda x: x.to(device), self.state), self.seen_tokens.to(device))

    def _fix_addresses(self) -> None:
        if not torch.compiler.is_compiling() and self.state is not None:
            for x in (*state_tensors(self.state), self.seen_tokens):
                torch._dynamo.mark_static_address(x)


class HLACache(Cache):
    """One entry per layer: `HLACacheLayer` for HLA layers, transformers' own for softmax layers.

    It can be copied (`copy`), written to a file (`save`) and read from one (`load`). For that it remembers the model
    that used it last, without keeping it alive.

    Args:
        config: of the model.
        max_cache_len: tokens for which softmax layers allocate keys and values ahead; None lets them grow.

    Attributes:
        next_logits: ``[B, vocab_size]`` of the token after the last one read, or None. `hla.generate.read` and
            `hla.generate.stream` set it, so that generation can go on without a token to read; any other call of the
            model clears it.
    """

    layers: list[Any]
    _is_user_defined = False  # set by generate for a cache it was given

    def __init__(self, config: HLAConfig, max_cache_len: int | None = None):
        def softmax_layer() -> CacheLayerMixin:
            return DynamicLayer() if max_cache_len is None else StaticLayer(max_cache_len=max_cache_len)

        super().__init__(
            layers=[HLACacheLayer() if kind == "linear_attention" else softmax_layer() for kind in config.layer_types]
        )
        self._softmax_length = max_cache_len  # (`max_cache_len` is a read-only property of caches)
        self.next_logits: Tensor | None = None
        self._model: weakref.ref[Any] | None = None
        self._unchecked: Fingerprint | None = None  # of the model in the file, until a model is met

    def meet(self, model: Any) -> None:
        """Called by a model before it reads tokens with this cache.

        Raises:
            HLAError: the state was made with another model.
        """
        self.next_logits = None
        self.check(model)

    def check(self, model: Any) -> None:
        """Remember the model and, the first time after `load`, see that it is the right one and go where it is.

        Raises:
            HLAError: the state was made with another model.
        """
        if self._unchecked is not None:
            check_model(self._unchecked, model, "the state")
            for block, layer in zip(base_of(model).layers, self.layers, strict=True):
                _move(layer, block.mixer.o_proj.weight.device)
            self._unchecked = None
        if torch.compiler.is_compiling():
            return
        known = None if self._model is None else self._model()
        if known is None or base_of(known) is not model:  # a causal model knows more than its base
            self._model = weakref.ref(model)

    def copy(self) -> HLACache:
        """The same state in tensors of its own: what one goes on with does not touch the other."""
        new = copy.copy(self)
        new.layers = [_copy_layer(layer) for layer in self.layers]
        new._model = self._model
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> HLACache:
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a weak reference cannot leave the process

    def save(self, path: str | Path, model: Any = None) -> None:
        """Write the state to a safetensors file, to go on from it later (`load`), in this process or another.

        The file holds the state, the counts of tokens, next_logits if there are any, and a fingerprint of the model; it
        has the same size after any number of tokens, unless there are softmax layers, whose keys and values it holds
        too. Masks are not part of a cache: where a left-padded batch needs its attention_mask (softmax layers), it
        needs it after loading as well. An existing file is replaced in one step or, if that fails, left as it is.

        Args:
            model: that the state belongs to; by default the one that used the cache last. Its weights must still be
                those that read the tokens.

        Raises:
            HLAError: nothing was read yet, the model is not known or gone, or the file cannot be written.
        """
        if not self.is_initialized:
            raise HLAError("the cache is empty: there is no state to save before a model has read something")
        if model is None and self._model is not None:
            model = self._model()
        if model is None and self._unchecked is None:
            raise HLAError("the cache does not know its model (any more): give it, cache.save(path, model=model)")
        if model is not None and self._unchecked is not None:
            check_model(self._unchecked, model, "the state")
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, HLACacheLayer):
                assert layer.seen_tokens is not None
                parts = {**_named(layer.state), "seen_tokens": layer.seen_tokens}
            else:
                seen = int(layer.get_seq_length())
                parts = {"keys": layer.keys[:, :, :seen], "values": layer.values[:, :, :seen]}
            tensors |= {f"layers.{i}.{name}": x for name, x in parts.items()}
        if self.next_logits is not None:
            tensors["next_logits"] = self.next_logits
        made_with = self._unchecked if model is None else fingerprint(model)
        assert made_with is not None
        write_state(path, tensors, made_with, {"max_cache_len": self._softmax_length})

    @classmethod
    def load(cls, path: str | Path, model: Any = None, device: torch.device | str | None = None) -> HLACache:
        """A cache that goes on from the state in a file of `save`.

        Args:
            model: that will use it, to be told here and now if it is the wrong one; otherwise its first use tells.
            device: for the tensors; by default they go where the model has its layers, here or at the first use.

        Raises:
            HLAError: the file is missing, damaged, no state or of another version, or the model is not the one that the
                state was made with. Weights in another dtype make another model: their states differ by rounding.
        """
        tensors, made_with, config, layout = read_state(path)
        name = f"the state file {str(path)!r}"
        if model is not None:
            check_model(made_with, model, name)
        with torch.inference_mode(False):
            cache = cls(config, layout["max_cache_len"])
            state: Any = state_class(config.op, config.order if config.op == "hla_q" else 2)
            for i, layer in enumerate(cache.layers):
                prefix = f"layers.{i}."
                parts = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
                place = device
                if place is None and model is not None:
                    place = base_of(model).layers[i].mixer.o_proj.weight.device
                parts = {n: x.to(place or "cpu", copy=True) for n, x in parts.items()}
                try:
                    if isinstance(layer, HLACacheLayer):
                        op = {n: parts[f"op.{n}"] for n in state._fields if f"op.{n}" in parts}
                        layer.fill(
                            LayerState(parts.get("conv"), state(**op), parts.get("position")), parts["seen_tokens"]
                        )
                    else:
                        layer.update(parts["keys"], parts["values"])
                except (KeyError, TypeError) as error:
                    raise HLAError(f"{name} does not hold what a state file holds: layer {i}, {error}") from error
            if (logits := tensors.get("next_logits")) is not None:
                place = device if model is None else base_of(model).get_input_embeddings().weight.device
                cache.next_logits = logits.to(device or place or "cpu", copy=True)
        if model is None:
            cache._unchecked = made_with
        else:
            cache._model = weakref.ref(model)
        return cache

    def reset(self) -> None:
        """Back to before the first token."""
        self.next_logits = self._unchecked = None
        for i, layer in enumerate(self.layers):
            if isinstance(layer, DynamicLayer):  # its own reset keeps the length in older versions of transformers
                self.layers[i] = DynamicLayer()
            else:
                layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues what sequence ``beam_idx[i]`` was (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._logits(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times: so many continuations of it in one batch."""
        super().batch_repeat_interleave(repeats)
        self._logits(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences with these indices (or where a mask is true)."""
        super().batch_select_indices(indices)
        self._logits(lambda x: x[indices.to(x.device)])

    def _logits(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.next_logits is not None:
            self.next_logits = function(self.next_logits)

    @property
    def is_initialized(self) -> bool:
        """Whether something was read."""
        return all(layer.is_initialized for layer in self.layers)

    def advance(self, tokens: int) -> None:
        """Counts tokens whose effect is now in the states of the HLA layers (in one launch for all of them)."""
        seen = [layer.seen_tokens for layer in self.layers if isinstance(layer, HLACacheLayer)]
        if counts := [x for x in seen if x is not None]:
            torch._foreach_add_(counts, tokens)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers are HLA layers."""
        return [isinstance(layer, HLACacheLayer) for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes held: constant for HLA layers, growing with the length for (dynamic) softmax layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, HLACacheLayer):
                total += layer.nbytes()
            elif layer.is_initialized:
                total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
        return total


def _own(x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return x.detach().clone()


def _copy_layer(layer: Any) -> Any:
    return layer.copy() if isinstance(layer, HLACacheLayer) else _map_attributes(copy.copy(layer), _own)


def _move(layer: Any, device: torch.device) -> None:
    if isinstance(layer, HLACacheLayer):
        layer.to(device)
    elif layer.is_initialized:
        _map_attributes(layer, lambda x: x.to(device))
        layer.device = device


def _map_attributes(layer: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A softmax layer with its tensors (keys, values, a count) replaced."""
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            value = function(value)
            setattr(layer, name, value)
            if isinstance(layer, StaticLayer):
                torch._dynamo.mark_static_address(value)
    return layer


def _named(state: LayerState | None) -> dict[str, Tensor]:
    assert state is not None
    parts = {"conv": state.conv, "position": state.position}
    parts |= {f"op.{name}": x for name, x in zip(state.op._fields, state.op, strict=True)}
    return {name: x for name, x in parts.items() if x is not None}
