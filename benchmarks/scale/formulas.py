"""Parameters, memory and bytes of a training step, as plain formulas of a configuration.

`benchmarks.scale.counting` compares them with what real processes allocate, keep and send. Bytes of communication are
those one rank receives from other ranks; in every pattern here it sends as many.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hla.models import HLAConfig

BF16, F32, INT64 = 2, 4, 8
# float32 parameter and gradient, and two moments of AdamW; FSDP2 shards all four.
STATE_BYTES = 4 * F32
# `hla.loss` makes float32 logits in pieces of 256 MiB: bfloat16 logits, float32 logits, and a gradient of each.
LOSS_BYTES = 3 * (256 << 20)


def check_form(config: HLAConfig) -> HLAConfig:
    """The configuration, refused where these formulas do not describe it.

    Raises:
        ValueError: another form than the default one, or untied embeddings.
    """
    default = HLAConfig()
    names = "op write_gate ridge decay nodes feature_map qk_norm normalize output_norm output_gate use_rope".split()
    changed = [name for name in names if getattr(config, name) != getattr(default, name)]
    changed += [] if config.tie_word_embeddings else ["tie_word_embeddings"]
    changed += [] if config.conv_size > 1 else ["conv_size"]
    changed += ["layer_types"] if "full_attention" in config.layer_types else []
    if changed:
        raise ValueError(f"the formulas are for the default form of the layer; {', '.join(changed)} differs")
    return config


# Parameters


def layer_matrices(config: HLAConfig) -> list[tuple[int, ...]]:
    """Shapes of the projections of one block."""
    check_form(config)
    D, inner, H, HKV = _sizes(config)
    o = H * config.head_v_dim
    per_token = [(H, D), (HKV, D), (HKV, D)]  # ridge, write gate, decay
    return [(channels(config), D), *per_token, (o, D), (D, o), (inner, D), (inner, D), (D, inner)]


def layer_others(config: HLAConfig) -> list[tuple[int, ...]]:
    """Shapes of the other parameters of one block: of the convolution, per head, and of norms."""
    D, _, H, HKV = _sizes(config)
    per_head = [(H,), (H, config.order + 1), (HKV,), (HKV,)]  # ridge, nodes, A_log, dt_bias
    return [(channels(config), config.conv_size), *per_head, (config.head_v_dim,), (D,), (D,)]


def layer_shapes(config: HLAConfig) -> list[tuple[int, ...]]:
    return layer_matrices(config) + layer_others(config)


def root_shapes(config: HLAConfig) -> list[tuple[int, ...]]:
    """Shapes of the parameters outside of the blocks: the embedding, also the output head, and the last norm."""
    return [(config.vocab_size, config.hidden_size), (config.hidden_size,)]


def numbers(shapes: list[tuple[int, ...]], ranks: int = 1) -> int:
    """How many numbers; FSDP2 cuts the first dimension and pads it to a multiple of the ranks."""
    return sum(-(-first // ranks) * ranks * math.prod(rest) for first, *rest in shapes)


def parameters(config: HLAConfig) -> int:
    return config.num_hidden_layers * numbers(layer_shapes(config)) + numbers(root_shapes(config))


def channels(config: HLAConfig) -> int:
    """Outputs of the fused projection: q, k and v."""
    return config.num_attention_heads * config.head_dim + config.num_key_value_heads * (
        config.head_dim + config.head_v_dim
    )


# Memory


def activation_bytes(config: HLAConfig) -> int:
    """What one block keeps per token for its backward pass, in bfloat16, on the path of the kernels.

    Each line is one operation: what it keeps that no earlier line kept.
    """
    check_form(config)
    D, inner, H, HKV = _sizes(config)
    q, k, v, o = H * config.head_dim, HKV * config.head_dim, HKV * config.head_v_dim, H * config.head_v_dim
    norms = 2 * (BF16 * D + F32 + BF16 * D)  # input, reciprocal root mean square, output
    convolution = 2 * BF16 * (q + k + v)  # input, and output
    query = F32 * (q + H) + BF16 * q  # the wide copy, reciprocal length, and the result
    key = F32 * (k + HKV) + 2 * BF16 * k  # the same, and the result times the write gate
    write_gate = HKV * (2 * F32 + 2 * BF16) + BF16 * v  # sigmoid, its root (also for k, for v), v times it
    ridge = 2 * F32 * H  # logarithm, and ridge
    decay = 3 * F32 * HKV  # argument of softplus, softplus, and g
    operator = 2 * BF16 * o  # its output, and one tensor of that size (saved_mib of ops_cuda.csv)
    output_norm = F32 * H + BF16 * o
    output_gate = 3 * BF16 * o  # projection, silu of it, product
    mlp = 4 * BF16 * inner  # gate, up, silu of the gate, product
    return norms + convolution + query + key + write_gate + ridge + decay + operator + output_norm + output_gate + mlp


def checkpoint_bytes(config: HLAConfig) -> int:
    """What one block keeps per token under activation checkpointing: its input."""
    return BF16 * config.hidden_size


class Memory(NamedTuple):
    """Bytes on one GPU, by what they are for."""

    sharded: float
    gathered: float
    activations: float
    working: float
    summaries: float

    @property
    def total(self) -> float:
        return sum(self)


def memory(
    config: HLAConfig, *, ranks: int, sp: int, tokens: int, checkpointing: bool, working_bytes: float, rows: int = 1
) -> Memory:
    """Bytes on a GPU while it trains.

    Args:
        ranks: of FSDP2, over which parameters, gradients and moments are sharded.
        sp: ranks a sequence is spread over.
        tokens: of each sequence.
        working_bytes: what the mixer's kernels need per token while they run (peak_mib of ops_cuda.csv).
        rows: sequences per group of sp ranks.
    """
    layers, local = config.num_hidden_layers, rows * tokens / sp
    layer, root = numbers(layer_shapes(config), ranks), numbers(root_shapes(config), ranks)
    # The embedding stays gathered, and of the blocks the one at work and the next; gradients are made in bfloat16 and
    # summed in float32, block by block.
    gathered = BF16 * (root + 2 * layer) + (BF16 + F32) * max(layer, root)
    kept = local * activation_bytes(config)
    activations = layers * local * checkpoint_bytes(config) + kept if checkpointing else layers * kept
    return Memory(
        sharded=STATE_BYTES * (layers * layer + root) / ranks,
        gathered=gathered,
        activations=activations,
        working=local * working_bytes + LOSS_BYTES,
        summaries=0.0 if sp == 1 else summary_memory(config, sp, rows, checkpointing),
    )


def summary_memory(config: HLAConfig, sp: int, rows: int, checkpointing: bool) -> float:
    """Bytes of summaries on a rank: what each layer keeps, and one message of all ranks on its way."""
    layers = 1 if checkpointing else config.num_hidden_layers
    return layers * fold_bytes(config, sp, rows) + sp * rows * summary_bytes(config)


def by_kernels(config: HLAConfig, kernels: bool = True) -> bool:
    """Whether operator and exchanges are one function (`hla.distributed.readings`): hla_q, where kernels run."""
    return kernels and config.op == "hla_q"


def fold_bytes(config: HLAConfig, sp: int, rows: int = 1, kernels: bool = True) -> int:
    """What one layer keeps of the summaries on the last rank, by kernels on every one.

    The states that enter its piece and those that leave it, and the decays of all pieces; otherwise the summaries of
    all ranks, and what each earlier one weighs.
    """
    decays = F32 * config.num_key_value_heads
    if by_kernels(config, kernels):
        return rows * (2 * (summary_bytes(config) - decays) + sp * decays)
    return rows * (sp * summary_bytes(config) + (sp - 1) * decays)


# Bytes of communication


def summary_numbers(op: str, *, HKV: int, HP: int, K: int, V: int, order: int = 2) -> int:
    """What a rank tells of its piece of one sequence (`hla.ops.segments`)."""
    return {
        "linear_attn": HKV * (1 + K * V),
        "hla_q": HKV * (1 + K * K + K * V),
        "hla2": HKV * (1 + K * K) + 2 * HP * K * V,
        "ahla": HKV * (1 + K * V) + (order - 1) * HP * (K * K + K * V),
        "hla3": HKV * (1 + K * K + K * V) + 2 * HP * (K * K + K * V),
    }[op]


def chain_numbers(op: str, *, HKV: int, HP: int, K: int, V: int) -> tuple[int, int]:
    """What a rank tells by the kernels of chains, stage after stage (`hla.distributed.chains`): decays, and states."""
    keys, moment, last = HKV * K * K, HKV * K * V, HP * K * V
    return {
        "linear_attn": (HKV, moment),
        "hla2": (HKV + HP, keys + last),
        "ahla": (HKV + HP, moment + last),
        "hla3": (2 * HKV + HP, keys + moment + last),
    }[op]


def summary_bytes(config: HLAConfig) -> int:
    HKV = config.num_key_value_heads
    return F32 * summary_numbers(config.op, HKV=HKV, HP=HKV, K=config.head_dim, V=config.head_v_dim)


def halo_bytes(config: HLAConfig) -> int:
    """The last inputs of the short convolution, float32."""
    return F32 * (config.conv_size - 1) * channels(config)


class Traffic(NamedTuple):
    """Bytes a rank receives, by collective."""

    all_gather: int = 0
    all_to_all: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0
    send: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: int) -> Traffic:
        return Traffic(*(n * a for a in self))


def hla_layer(
    config: HLAConfig, sp: int, rows: int = 1, checkpointing: bool = False, kernels: bool = True
) -> Traffic:  # fmt: skip
    """A layer, forward and backward: summaries and halos of all other ranks, and their gradients back.

    Checkpointing runs the forward pass, and with it the gathers, once more. Nothing depends on the length.
    """
    summaries, halos = ((sp - 1) * rows * x for x in (summary_bytes(config), halo_bytes(config)))
    forward = (summaries + halos) * (2 if checkpointing else 1)
    if by_kernels(config, kernels):  # every rank tells what it does to the states, and folds itself
        decays = (sp - 1) * rows * F32 * config.num_key_value_heads
        return Traffic(all_gather=forward + summaries - decays, all_to_all=halos)
    return Traffic(all_gather=forward, all_to_all=summaries + halos)


def ring_layer(config: HLAConfig, sp: int, tokens: int, rows: int = 1, checkpointing: bool = False) -> Traffic:
    """Ring attention: K and V of every rank pass every rank; backward again, and their float32 gradients with them.

    Causality saves no bytes: the last piece reads all of them. The gradients make one hop more, home.
    """
    kv = rows * tokens // sp * config.num_key_value_heads * (config.head_dim + config.head_v_dim)
    passes = 3 if checkpointing else 2
    return Traffic(send=passes * (sp - 1) * BF16 * kv + (sp * F32 * kv if sp > 1 else 0))


def ulysses_layer(
    config: HLAConfig, sp: int, tokens: int, rows: int = 1, checkpointing: bool = False
) -> Traffic | None:
    """Ulysses: all-to-alls turn pieces of the sequence into groups of heads (q, k, v) and back (o); backward the same.

    None where there are more ranks than key heads to give them.
    """
    if config.num_key_value_heads % sp:
        return None
    widths = channels(config) + config.num_attention_heads * config.head_v_dim
    local = rows * tokens // sp * widths * BF16
    return Traffic(all_to_all=(3 if checkpointing else 2) * local * (sp - 1) // sp)


def loss_traffic(sp: int) -> Traffic:
    """The number of labels (int64) and the loss (float32) summed over the ranks of a sequence, once each."""
    return Traffic(all_reduce=(INT64 + F32) if sp > 1 else 0)


def fsdp_step(config: HLAConfig, ranks: int) -> Traffic:
    """FSDP2 as `hla.distributed.parallelize_hla` applies it, in bfloat16 with gradients summed in float32.

    The parameters of blocks are gathered forward and backward, matrices in bfloat16 and the others in float32; the
    rest, in bfloat16, once.
    """
    layers, others = config.num_hidden_layers, ranks - 1
    matrices, small = numbers(layer_matrices(config), ranks), numbers(layer_others(config), ranks)
    root = numbers(root_shapes(config), ranks)
    return Traffic(
        all_gather=(2 * layers * (BF16 * matrices + F32 * small) + BF16 * root) // ranks * others,
        reduce_scatter=F32 * (layers * (matrices + small) + root) // ranks * others,
    )


def _sizes(config: HLAConfig) -> tuple[int, int, int, int]:
    return (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )


def config_of(size: str, **options: Any) -> HLAConfig:
    """The configuration of one of the project's sizes, with a vocabulary of 32,000 unless told otherwise."""
    from hla.models import SIZES

    return HLAConfig(**{"vocab_size": 32000, **SIZES[size], **options})
