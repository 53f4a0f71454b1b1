"""`HLAConfig`: everything that defines an HLA language model, and the sizes the project uses."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from hla.layer_arguments import check_arguments, coefficient_names, default_coefficient

KNOWN_TO_TRANSFORMERS = {
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "rope_scaling", "rope_theta", "torch_dtype",
}  # fmt: skip
LAYER_TYPES = ("linear_attention", "full_attention")

# Parameters, with a tied embedding of 2,048 tokens (tiny), 8,192 (small), 32,000 (above): 1.4M, 25M, 124M, 348M, 1.3B.
# tiny is what learns most in the minutes of a demo on two CPU cores.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 512},
    "small": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1408},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2304},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2560},
    "large": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5120},
}


ROPE = '{"rope_type": "default", "rope_theta": number}'
CONFIG_VERSION = 2
# Version 1 saved no version, and left out the fields that had these values.
VERSION_1 = {
    "op": "hla2", "p": "k", "ridge": "delta", "gain": "delta", "value_ridge": "delta", "value_gain": "delta",
    "write_gate": False, "decay": "none",
}  # fmt: skip


class HLAConfig(PreTrainedConfig):
    """Configuration of `HLAModel` and `HLAForCausalLM`.

    Args:
        vocab_size, hidden_size, num_hidden_layers: sizes of the embedding, of the residual stream, and depth.
        num_attention_heads, num_key_value_heads, head_dim, head_v_dim: heads of the linear and of the softmax layers
            (softmax layers use head_dim for values too); None means as many key heads as query heads,
            ``hidden_size // num_attention_heads``, and head_dim.
        intermediate_size: width of the gated MLP; None means 8/3 of hidden_size, rounded up to a multiple of 64.
        hidden_act: activation of the gated MLP.
        max_position_embeddings: context length the model is meant for. Nothing is sized by it.
        initializer_range: standard deviation of fresh weights; projections back to the residual stream get
            ``initializer_range / sqrt(2 num_hidden_layers)``.
        rms_norm_eps: of all norms.
        use_cache: return a cache outside of training.
        tie_word_embeddings: one matrix for input embedding and output head.
        rope_parameters: ``{"rope_type": "default", "rope_theta": ...}``, of softmax layers and, with use_rope, of HLA.
        use_rope: rotary embeddings in HLA layers.
        layer_types: ``"linear_attention"`` (HLA) or ``"full_attention"`` (softmax) per layer; None means all HLA.
        op, order, nodes, write_gate, p, ridge, gain, value_ridge, value_gain, decay, conv_size, feature_map, qk_norm,
            normalize, output_norm, output_gate: of the HLA layers, see `hla.HigherOrderLinearAttention`.
        config_version: which defaults a saved configuration was written with. It is saved, with every field of this
            class, so that a model keeps its meaning when defaults change; one that a newer release wrote is refused.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    model_type = "hla"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    # None stands for a value derived from the others in __post_init__; afterwards it is never None.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    head_v_dim: int = None  # type: ignore[assignment]
    intermediate_size: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    use_rope: bool = False
    layer_types: list[str] = None  # type: ignore[assignment]
    op: str = "hla_q"
    order: int = 4
    nodes: str = "head"
    write_gate: bool | None = None
    p: str = "k"
    ridge: float | str | None = None
    gain: float | str | None = None
    value_ridge: float | str | None = None
    value_gain: float | str | None = None
    decay: str = "token"
    conv_size: int = 4
    feature_map: str = "silu"
    qk_norm: str = "l2"
    normalize: bool = False
    output_norm: bool = True
    output_gate: bool = True
    config_version: int = CONFIG_VERSION

    def __post_init__(self, **kwargs: Any):
        _check_unknown(kwargs)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _check_positive_int(name, getattr(self, name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_v_dim is None:
            self.head_v_dim = self.head_dim
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // (3 * 64)) * 64
        # What None stands for is written down, so that a saved configuration says it.
        for name in coefficient_names(self.op):
            if getattr(self, name) is None:
                setattr(self, name, default_coefficient(self.op))
        if self.write_gate is None:
            self.write_gate = self.op == "hla_q"
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        # (Before transformers iterates over them.)
        if not isinstance(self.layer_types, list | tuple) or any(kind not in LAYER_TYPES for kind in self.layer_types):
            raise ValueError(f"layer_types must be a list of {LAYER_TYPES}, got {self.layer_types!r}")
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, dict):
            raise ValueError(f"rope_parameters must be {ROPE}, got {self.rope_parameters!r}")
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a dictionary, of any version so far."""
        if "config_version" not in config_dict:
            config_dict = {**VERSION_1, **config_dict, "config_version": CONFIG_VERSION}
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: every field of this class, whatever its default, beside transformers' own differences."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        own = {x.name: getattr(self, x.name) for x in fields(HLAConfig) if x.name not in inherited}
        return {**super().to_diff_dict(), **own}

    def mixer_arguments(self) -> dict[str, Any]:
        """The arguments of `hla.HigherOrderLinearAttention` for the HLA layers of this model."""
        same_names = (
            "head_dim", "head_v_dim", "op", "order", "nodes", "write_gate", "p", "ridge", "gain", "value_ridge",
            "value_gain", "decay", "conv_size", "feature_map", "qk_norm", "normalize", "output_norm", "output_gate",
        )  # fmt: skip
        return {
            "hidden_size": self.hidden_size,
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads,
            "rope_theta": self.rope_parameters["rope_theta"] if self.use_rope else None,
            "norm_eps": self.rms_norm_eps,
            **{name: getattr(self, name) for name in same_names},
        }

    def _check(self) -> None:
        if _check_positive_int("config_version", self.config_version) > CONFIG_VERSION:
            raise ValueError(
                f"this configuration has config_version {self.config_version}; this release of hla knows up to "
                f"{CONFIG_VERSION}: a newer one is needed"
            )
        for name in ("intermediate_size", "max_position_embeddings"):
            _check_positive_int(name, getattr(self, name))
        if self.num_attention_heads % _check_positive_int("num_key_value_heads", self.num_key_value_heads):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}) if head_dim is not given"
            )
        for name in ("use_cache", "tie_word_embeddings", "use_rope"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.initializer_range, bool) or not isinstance(self.initializer_range, int | float):
            raise TypeError(f"initializer_range must be a number, got {self.initializer_range!r}")
        if not 0 < self.initializer_range <= 1:
            raise ValueError(f"initializer_range must be above 0 and at most 1, got {self.initializer_range}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation known to transformers, got {self.hidden_act!r}")
        for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [] if value is None else [value]:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise TypeError(f"{name} must be an integer, got {token!r}")
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name} must be from 0 to vocab_size - 1 ({self.vocab_size - 1}), got {token}")

        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers = {self.num_hidden_layers}"
            )
        rope = self.rope_parameters
        if rope.get("rope_type") != "default" or set(rope) != {"rope_type", "rope_theta"}:
            raise ValueError(f"rope_parameters must be {ROPE}, got {rope!r}")
        # Softmax layers need a valid base and an even head_dim even where the HLA layers use no RoPE.
        theta = rope["rope_theta"] if "full_attention" in self.layer_types or self.use_rope else None
        check_arguments(**{**self.mixer_arguments(), "rope_theta": theta}, scale=None, bias=False)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (transformers saves no other configuration), got {self.head_dim}")


def _check_unknown(kwargs: dict[str, Any]) -> None:
    """Only names that transformers itself hands over (from a saved configuration, say) may come beside the fields."""
    unknown = [name for name in kwargs if name not in KNOWN_TO_TRANSFORMERS and not name.startswith("_")]
    if unknown:
        known = [field.name for field in fields(HLAConfig)]
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"HLAConfig has no argument {unknown[0]!r}{hint}")


def _check_positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
