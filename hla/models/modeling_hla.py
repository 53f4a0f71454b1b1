"""The language model: pre-norm blocks of an HLA (or softmax attention) mixer and a gated MLP, on transformers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hla.convolution import positions_in_packed
from hla.joined import has_kernels, joinable, joined
from hla.layers import HigherOrderLinearAttention
from hla.models.cache_hla import HLACache
from hla.models.configuration_hla import HLAConfig
from hla.norm import RMSNorm, residual
from hla.ops.checks import HAS_TRITON
from hla.projection import is_bare, project
from hla.rotary import apply_rope, rope_cos_sin

if TYPE_CHECKING:
    from hla.distributed import SequenceParallel


class HLAAttention(nn.Module):
    """Causal softmax attention with rotary embeddings and grouped heads, for ``"full_attention"`` layers."""

    def __init__(self, config: HLAConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, size + 2 * kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        past_key_values: HLACache | None,
    ) -> Tensor:
        q, k, v = (
            project(self.qkv_proj, hidden_states)
            .unflatten(-1, (-1, self.head_dim))
            .split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 2)
        )
        q, k = self._rotate(q, k, *cos_sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if past_key_values is not None:
            mask = causal_mask(attention_mask, q.shape[2], past_key_values, self.layer_idx, q.device)
            k, v = past_key_values.update(k, v, self.layer_idx)
            o = self._attend(q, k, v, mask)
        elif cu_seqlens is not None:
            # Document by document: no T x T mask, and no work across borders.
            lengths = cu_seqlens.diff().tolist()
            documents = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
            o = torch.cat(
                [self._attend(*document, None) if document[0].shape[2] else document[0] for document in documents], 2
            )
        else:
            o = self._attend(q, k, v, causal_mask(attention_mask, q.shape[2], None, self.layer_idx, q.device))
        return project(self.o_proj, o.transpose(1, 2).flatten(2))

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with rotary embeddings, contiguous ``[B, T, heads, head_dim]``."""
        if self._has_kernels(q) and not torch.compiler.is_compiling():  # (which fuses for itself)
            from hla.kernels.rotary import fits, rotated

            if fits(q, k, cos, sin):
                return rotated(q, k, cos, sin)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    def _has_kernels(self, x: Tensor) -> bool:
        """Whether Triton kernels take a tensor."""
        return x.is_cuda and HAS_TRITON

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal = mask is None and q.shape[2] > 1
        grouped = self.num_heads != self.num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def causal_mask(
    attention_mask: Tensor | None, length: int, past_key_values: HLACache | None, layer_idx: int, device: torch.device
) -> Tensor | None:
    """Which keys each of the ``length`` new tokens may read, bool ``[B or 1, 1, length, keys]``.

    None if that is plain causality over the new tokens, or all keys for a single token.

    Args:
        attention_mask: ``[B, all tokens so far]``, 0 at pads, or None.
    """
    past, keys, grows = 0, length, True
    if past_key_values is not None:
        layer = past_key_values.layers[layer_idx]
        past, (keys, _) = layer.get_seq_length(), layer.get_mask_sizes(length)
        grows = layer.get_max_length() == -1
    if attention_mask is not None and grows and attention_mask.shape[1] != keys:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens; softmax layers need all {keys}, cached ones too"
        )
    if attention_mask is None and grows and (length == 1 or keys == length):
        return None
    query = torch.arange(length, device=device)[:, None] + past
    key = torch.arange(keys, device=device)
    allowed = (key <= query)[None, None]
    if attention_mask is not None:
        real = F.pad(attention_mask != 0, (0, keys - attention_mask.shape[1]))[:, None, None]
        # A pad reads itself, so that no row is empty; nobody reads a pad.
        allowed = (allowed & real) | (key == query)
    return allowed


class HLAMLP(nn.Module):
    """Gated MLP (SwiGLU with the default activation)."""

    def __init__(self, config: HLAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.hidden_act, self.act = config.hidden_act, ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        # (Under torch.compile, which fuses for itself, operation by operation.)
        if has_kernels(x) and self.hidden_act in ("silu", "swish") and not torch.compiler.is_compiling():
            from hla.kernels.gates import silu_of_halves, silu_product

            both = [self.gate_proj, self.up_proj]
            if joinable(x, both):
                return self.down_proj(silu_of_halves(joined(x, [both])[0], self.gate_proj.out_features))
            return self.down_proj(silu_product(project(self.gate_proj, x), project(self.up_proj, x)))
        return project(self.down_proj, self.act(project(self.gate_proj, x)) * project(self.up_proj, x))


class HLABlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``.

    While a model trains on a GPU, the last sum is left to the norm behind it (`RMSNorm.residual`), which is that of the
    next block: with ``apart`` the two summands are returned, and ``branch`` is the second one of the block before.
    """

    def __init__(self, config: HLAConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer: HigherOrderLinearAttention | HLAAttention
        if config.layer_types[layer_idx] == "linear_attention":
            self.mixer = HigherOrderLinearAttention(**config.mixer_arguments())
        else:
            self.mixer = HLAAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = HLAMLP(config)
        for projection in (self.mixer.o_proj, self.mlp.down_proj):
            projection.init_scale = (2 * config.num_hidden_layers) ** -0.5  # read by _init_weights

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cos_sin: tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: HLACache | None = None,
        branch: Tensor | None = None,
        apart: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(self.mixer, HLAAttention):
            assert cos_sin is not None
            hidden_states, x = residual(self.input_layernorm, hidden_states, branch)
            x = self.mixer(x, cos_sin, attention_mask, cu_seqlens, past_key_values)
        else:
            length = hidden_states.shape[1]
            if attention_mask is not None:
                attention_mask = attention_mask[:, attention_mask.shape[1] - length :]
            cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            state = None if cache is None else cache.prepare(self.mixer, hidden_states)
            alone = self.mixer.sequence_parallel is None
            if state is not None and length == 1 and alone and hidden_states.is_cuda and HAS_TRITON:
                if not torch.compiler.is_compiling():  # (which does as much by itself)
                    from hla.kernels.token import fits, token

                    if fits(self, hidden_states):
                        return token(self, hidden_states, state, attention_mask)
            hidden_states, x = residual(self.input_layernorm, hidden_states, branch)
            x, _ = self.mixer(
                x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seqlens=cu_seqlens,
                state=state,
                out_state=state,
            )
        hidden_states, x = residual(self.post_attention_layernorm, hidden_states, x)
        x = self.mlp(x)
        return (hidden_states, x) if apart else hidden_states + x


class HLAPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving shared by the HLA models."""

    config_class = HLAConfig
    config: HLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HLABlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True
    _can_compile_fullgraph = True
    # Few numbers that set time scales and step sizes: rounded to bfloat16 they would be off by up to 0.4%.
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias", "log_b", "node_logits", "ridge_head"}

    sequence_parallel: Any = None  # a SequenceParallel (transformers reads annotations, and this name is not imported)

    def set_sequence_parallel(self, parallel: SequenceParallel | None) -> None:
        """From now on the model takes one piece of the sequence on each rank (`hla.distributed`); None ends that.

        Tensors per token are those of this rank, ``cu_seq_lens_q`` and ``past_key_values`` those of the whole sequence,
        labels come shifted (``shift_labels``), and the loss is that of the whole sequence on every rank: gradients of
        the parameters must be summed over the ranks. `hla.distributed.shard_sequence` cuts a batch this way.

        Raises:
            ValueError: the model has softmax layers, which read keys of the whole sequence.
        """
        blocks = [module for module in self.modules() if isinstance(module, HLABlock)]
        softmax = [block.layer_idx for block in blocks if isinstance(block.mixer, HLAAttention)]
        if parallel is not None and softmax:
            raise ValueError(f"softmax layers have no sequence parallelism here; layers {softmax} are full_attention")
        for module in self.modules():
            if isinstance(module, (HigherOrderLinearAttention, HLAPreTrainedModel)):
                module.sequence_parallel = parallel

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std * getattr(module, "init_scale", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, HigherOrderLinearAttention):
            for parameter, value in module.start_values():
                init.copy_(parameter, value)


class HLAModel(HLAPreTrainedModel):
    """Embedding, blocks and final norm, without the output head."""

    def __init__(self, config: HLAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HLABlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HLACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, hidden_size]`` of the last block, normalised.

        Args:
            input_ids: int ``[B, T]``; or inputs_embeds: ``[B, T, hidden_size]``.
            attention_mask: ``[B, T]`` or, with a cache, ``[B, tokens so far + T]``; 0 at pads.
            position_ids: int ``[B, T]``; without mask and cache, every jump in them starts a new document.
            past_key_values: an `HLACache`, updated in place.
            use_cache: return a cache; by default as configured, but not while training and not for packed documents.
            output_hidden_states: also return the input of every block and the final output.
            cu_seq_lens_q: int ``[N + 1]``, borders of documents packed into one row (B = 1).
            output_attentions: None or False, which is what PEFT passes to every model; there are no such matrices.

        Raises:
            ValueError: output_attentions, not exactly one of input_ids and inputs_embeds, or shapes that do not fit.
            TypeError: past_key_values of another kind.
        """
        if output_attentions:
            raise ValueError("output_attentions must be None or False: an HLA layer has no attention matrix")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if past_key_values is not None and not isinstance(past_key_values, HLACache):
            raise TypeError(f"past_key_values must be an HLACache, got {type(past_key_values).__name__}")
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        batch, length, _ = inputs_embeds.shape
        if attention_mask is not None:
            shape, new_only = tuple(attention_mask.shape), past_key_values is None
            if len(shape) != 2 or shape[0] != batch or shape[1] < length or (new_only and shape[1] != length):
                expected = f"[{batch}, {length}]" + ("" if new_only else f" or [{batch}, tokens so far + {length}]")
                raise ValueError(f"attention_mask has shape {shape}; expected {expected}")
        starts = document_starts(batch, length, attention_mask, position_ids, past_key_values, cu_seq_lens_q)
        parallel = self.sequence_parallel
        if parallel is not None and starts is not None and position_ids is not None and cu_seq_lens_q is None:
            if bool(starts[:, 1:].any() | (position_ids[:, :1] != parallel.span(length).start).any()):
                raise ValueError(
                    "position_ids of a sequence-parallel model count on from the rank before; packed documents need "
                    "cu_seq_lens_q (hla.distributed.shard_sequence makes it)"
                )
        elif starts is not None and position_ids is not None and cu_seq_lens_q is None:
            if bool(starts[:, 1:].any()):  # packed through position_ids: the rows become one
                cu_seq_lens_q = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=batch * length)
                inputs_embeds = inputs_embeds.reshape(1, batch * length, -1)
                position_ids = position_ids.expand(batch, length).reshape(1, -1)
        if cu_seq_lens_q is not None:
            if past_key_values is not None:
                raise ValueError("past_key_values cannot continue packed documents (cu_seq_lens_q or position_ids)")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = HLACache(self.config)
        if past_key_values is not None:
            past_key_values.meet(self)
        # Nothing to mask is common (generate always makes a mask); finding out would make a GPU wait.
        # (Ranks would find out different things.)
        readable = attention_mask is not None and attention_mask.device.type == "cpu" and parallel is None
        if attention_mask is not None and readable and not torch.compiler.is_compiling():
            attention_mask = None if bool((attention_mask != 0).all()) else attention_mask

        cos_sin = None
        if "full_attention" in self.config.layer_types:
            position_ids = self._position_ids(
                inputs_embeds, attention_mask, position_ids, past_key_values, cu_seq_lens_q
            )
            theta = self.config.rope_parameters["rope_theta"]
            cos_sin = rope_cos_sin(position_ids, self.config.head_dim, theta, inputs_embeds.dtype)

        x, branch = inputs_embeds, None
        seen = [x]
        # (A block that is computed again keeps its inputs: one rather than two.)
        again = self.gradient_checkpointing or any(
            getattr(block, "gradient_checkpointing", False) for block in self.layers
        )
        apart = self.training and torch.is_grad_enabled() and has_kernels(x) and not (output_hidden_states or again)
        # (Hooks of a block are to see its output, and what wraps or extends it knows of no other.)
        apart = apart and all(is_bare(b) and type(b).forward is HLABlock.forward for b in self.layers)
        for block in self.layers:
            x = block(
                x,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cos_sin=cos_sin,
                cu_seqlens=cu_seq_lens_q,
                past_key_values=past_key_values,
                **(dict(branch=branch, apart=True) if apart else {}),
            )
            if apart:
                x, branch = x
            if output_hidden_states:
                seen.append(x)
        if past_key_values is not None:
            past_key_values.advance(length if parallel is None else parallel.borders(length)[-1])
        _, x = residual(self.norm, x, branch)
        seen[-1] = x
        if x.shape[:2] != (batch, length):  # rows that became one; else the very tensors, whose gradients can be kept
            x, seen = x.reshape(batch, length, -1), [h.reshape(batch, length, -1) for h in seen]
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(seen) if output_hidden_states else None,
        )

    def _position_ids(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: HLACache | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Positions ``[B or 1, T]`` of the new tokens, pads not counted."""
        if position_ids is not None:
            return position_ids
        length = inputs_embeds.shape[1]
        if cu_seqlens is not None:
            return positions_in_packed(cu_seqlens, length)[1][None]
        if attention_mask is not None:
            counted = (attention_mask != 0).long().cumsum(1) - 1
            return counted.clamp(min=0)[:, counted.shape[1] - length :]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return (torch.arange(length, device=inputs_embeds.device) + past)[None]


def document_starts(
    batch: int,
    length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: HLACache | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """bool ``[B, T]``: where documents begin in packed rows; None if nothing says that the rows may be packed."""
    if cu_seqlens is not None:
        return positions_in_packed(cu_seqlens, length)[1][None] == 0
    if position_ids is None or attention_mask is not None or past_key_values is not None:
        return None
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return F.pad(jumps, (1, 0), value=True)[:, :length].expand(batch, length)


class HLAForCausalLM(HLAPreTrainedModel, GenerationMixin):
    """`HLAModel` with an output head: next-token logits, loss, and `generate` with a state of constant size."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # forward takes num_items_in_batch, which Trainer cannot see otherwise

    def __init__(self, config: HLAConfig):
        super().__init__(config)
        self.model = HLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HLACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, vocab_size]`` of the next token, and the loss. Arguments beside those of `HLAModel`:

        Args:
            labels: int ``[B, T]``, usually the input_ids; -100 is ignored. Shifted here: the logits at t are held
                against ``labels[t + 1]``, and in packed rows never against the first token of the next document.
            logits_to_keep: logits of only the last so many positions (0: all), or of these indices.
            num_items_in_batch: divides the summed loss (gradient accumulation); by default the number of labels.
            shift_labels: int ``[B, T]``, already shifted: the logits at t are held against ``shift_labels[t]`` as they
                are. They take precedence over labels.
        """
        if isinstance(past_key_values, HLACache):
            past_key_values.meet(self)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = project(self.lm_head, outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            batch, length = outputs.last_hidden_state.shape[:2]
            starts = document_starts(batch, length, attention_mask, position_ids, past_key_values, cu_seq_lens_q)
            if starts is not None and labels is not None:
                labels = labels.masked_fill(starts, -100)
            if self.sequence_parallel is not None:
                from hla.distributed.batch import labels_everywhere

                num_items_in_batch = labels_everywhere(shift_labels, num_items_in_batch, self.sequence_parallel)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
            if self.sequence_parallel is not None:
                from hla.distributed.batch import same_everywhere

                loss = same_everywhere(loss, self.sequence_parallel)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate reads the signature
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The arguments of a step; not the tokenizer, which `generate` has used (for stop_strings) but hands on."""
        inputs = GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)
        inputs.pop("tokenizer", None)
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: HLAConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor | None:
        """The mask a step of `generate` needs: for HLA layers only that of the new tokens, so its shape stays fixed."""
        if attention_mask is None or "full_attention" in config.layer_types:
            return attention_mask
        return attention_mask[:, attention_mask.shape[1] - inputs_embeds.shape[1] :]

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Gives `generate` an `HLACache` unless the caller passed one or wants none."""
        if self.sequence_parallel is not None:
            raise ValueError("generate runs in one process: call set_sequence_parallel(None) before it")
        kind = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values")
        if given is not None:
            if not isinstance(given, HLACache):
                raise TypeError(f"past_key_values must be an HLACache, got {type(given).__name__}")
            if kind is not None:
                raise ValueError(f"cache_implementation ({kind!r}) cannot be combined with past_key_values")
            given._is_user_defined = True  # tells generate to leave it as after the last token
        elif generation_config.use_cache is not False:
            if kind not in (None, "dynamic", "static"):
                raise ValueError(f'cache_implementation must be None, "dynamic" or "static", got {kind!r}')
            model_kwargs["past_key_values"] = HLACache(self.config, max_cache_length if kind == "static" else None)


def count_parameters(config: HLAConfig) -> int:
    """Parameters of the causal language model, tied weights counted once; allocates nothing."""
    with torch.device("meta"):
        model = HLAForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
