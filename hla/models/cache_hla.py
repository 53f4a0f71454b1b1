"""What an HLA model keeps between calls of `generate`: a state of constant size per HLA layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from hla.layers import HigherOrderLinearAttention, LayerState, map_state, state_tensors
from hla.models.configuration_hla import HLAConfig


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
            if not torch.compiler.is_compiling():
                for x in (*state_tensors(self.state), self.seen_tokens):
                    torch._dynamo.mark_static_address(x)
        if batch != self.batch_size:
            raise ValueError(f"past_key_values holds {self.batch_size} sequences, the input {batch}")
        return self.state

    def advance(self, tokens: int) -> None:
        """Counts tokens whose effect is now in the state."""
        assert self.seen_tokens is not None
        self.seen_tokens.add_(tokens)

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
        tensors = state_tensors(self.state)
        self.batch_size = tensors[0].shape[0]
        for x in tensors:
            torch._dynamo.mark_static_address(x)


class HLACache(Cache):
    """One entry per layer: `HLACacheLayer` for HLA layers, transformers' own for softmax layers.

    Args:
        config: of the model.
        max_cache_len: tokens for which softmax layers allocate keys and values ahead; None lets them grow.
    """

    layers: list[Any]
    _is_user_defined = False  # set by generate for a cache it was given

    def __init__(self, config: HLAConfig, max_cache_len: int | None = None):
        def softmax_layer() -> CacheLayerMixin:
            return DynamicLayer() if max_cache_len is None else StaticLayer(max_cache_len=max_cache_len)

        super().__init__(
            layers=[HLACacheLayer() if kind == "linear_attention" else softmax_layer() for kind in config.layer_types]
        )

    def reset(self) -> None:
        """Back to before the first token."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, DynamicLayer):  # its own reset keeps the length in older versions of transformers
                self.layers[i] = DynamicLayer()
            else:
                layer.reset()

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
