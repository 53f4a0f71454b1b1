"""Expected time of a training step: measured rates of one H200, and links of a given speed. No such run was made."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.scale import formulas
from hla.models import HLAConfig

RESULTS = Path(__file__).parents[1] / "results"
MIXERS = {"hla_q": "hla_q default form", "hla2": "hla2", "linear_attn": "linear_attn", "softmax": "sdpa cudnn"}
# The summaries run in PyTorch, in float32; not measured on a GPU. 67: the data sheet of the H100, TFLOP/s outside of
# the matrix units.
SMALL_KERNEL = 4e-6  # seconds, an assumption: one small kernel of a loop that no other work hides
BACKWARD = 2.0  # of what lies between products: backward against forward, an assumption


@dataclass(frozen=True)
class Links:
    """Bytes per second in each direction, and seconds a collective takes per doubling of its ranks.

    Args:
        nvlink: of a GPU to others of its node.
        network: of a GPU to other nodes, one adapter each.
        node: GPUs of a node.
    """

    nvlink: float = 450e9
    network: float = 50e9
    node: int = 8
    latency: float = 10e-6

    def gather(self, received: float, ranks: int) -> float:
        """An all-gather or reduce-scatter: what enters a node enters it once, spread over its adapters."""
        if ranks == 1:
            return 0.0
        inside = received / self.nvlink
        outside = received * max(0, ranks - self.node) / (ranks - 1) / (self.node * self.network)
        return max(inside, outside) + self._wait(ranks)

    def exchange(self, received: float, ranks: int) -> float:
        """An all-to-all: every byte is another one."""
        if ranks == 1:
            return 0.0
        outside = received * max(0, ranks - self.node) / (ranks - 1)
        return max((received - outside) / self.nvlink, outside / self.network) + self._wait(ranks)

    def ring(self, received: float, ranks: int) -> float:
        """Hop by hop, and so that all adapters of a node carry a share (one plain ring uses one of them)."""
        if ranks == 1:
            return 0.0
        slowest = self.nvlink if ranks <= self.node else min(self.nvlink, self.node * self.network)
        return received / slowest + (ranks - 1) * self.latency

    def _wait(self, ranks: int) -> float:
        return self.latency * math.log2(ranks)


class Rates:
    """What was measured on one GPU: `benchmarks/results/ops_cuda.csv` and, for whole models, `generation_cuda.csv`."""

    def __init__(self, folder: Path = RESULTS):
        with open(folder / "ops_cuda.csv", newline="") as file:
            self.rows = [row for row in csv.DictReader(file) if row["dtype"] == "bfloat16"]
        with open(folder / "generation_cuda.csv", newline="") as file:
            whole = [r for r in csv.DictReader(file) if r["what"] == "prefill" and r["model"] == "HLA" and r["ms"]]
        self.prompts = {row["size"]: (int(row["context"]), float(row["ms"]) / 1e3) for row in whole}
        self.device = self.rows[0]["device"]
        self.matmul = float(self.rows[0]["matmul_tflop_s"]) * 1e12
        self.copy = float(self.rows[0]["copy_tb_s"]) * 1e12

    def mixer(self, op: str, config: HLAConfig, tokens: int) -> tuple[float, float]:
        """Seconds of the operator, forward and forward + backward, for one sequence of so many tokens on one GPU.

        From the row of the nearest length; linear operators in proportion to tokens, heads and width, softmax to one
        power of the tokens more. (Rows have 16 heads of 128. Few tokens do not fill a GPU and take longer than this.)
        """
        row = self._nearest(op, tokens)
        length, batch = int(row["T"]), int(row["B"])
        work = config.num_attention_heads * config.head_dim / (int(row["H"]) * int(row["D"]))
        work *= tokens / (batch * length) * (tokens / length if op == "softmax" else 1)
        return float(row["forward_ms"]) * work / 1e3, float(row["forward_backward_ms"]) * work / 1e3

    def working_bytes(self, config: HLAConfig) -> float:
        """Bytes per token that the operator's kernels need while they run, forward + backward, above its inputs."""
        row = self._nearest(config.op, 1 << 15)
        work = config.num_attention_heads * config.head_dim / (int(row["H"]) * int(row["D"]))
        return float(row["peak_mib"]) * 2**20 / (int(row["B"]) * int(row["T"])) * work

    def between(self, size: str, config: HLAConfig) -> float:
        """Seconds per token and block, forward, of everything but the large products and the operator.

        What a measured prompt took and they did not: norms, convolution, gates, activations, in PyTorch.
        """
        length, seconds = self.prompts[size]
        layers = config.num_hidden_layers
        products = layers * block_products(config) * length / self.matmul
        return (seconds - products - layers * self.mixer(config.op, config, length)[0]) / layers / length

    def _nearest(self, op: str, tokens: int) -> dict[str, str]:
        rows = [row for row in self.rows if row["operator"] == MIXERS[op]]
        return min(rows, key=lambda row: abs(math.log(int(row["T"]) / max(1, tokens))))


def block_products(config: HLAConfig) -> int:
    """FLOPs per token of a block's matrix products, forward."""
    D, o = config.hidden_size, config.num_attention_heads * config.head_v_dim
    return 2 * D * (formulas.channels(config) + 2 * o + 3 * config.intermediate_size)


class Step(NamedTuple):
    """Seconds of a training step on one rank, by what it spends them on."""

    products: float  # matrix products, the head's too
    between: float  # norms, convolution, gates, activations
    mixer: float
    summaries: float  # of the pieces, and folding those of the ranks before
    exposed: float  # communication that nothing hides

    @property
    def total(self) -> float:
        return sum(self)


def step(
    method: str, size: str, config: HLAConfig, rates: Rates, links: Links, *, ranks: int, sp: int, tokens: int,
    checkpointing: bool,
) -> Step | None:  # fmt: skip
    """A step of one sequence of ``tokens`` on every ``sp`` of ``ranks`` GPUs.

    Assumed: the gather of the summaries hides behind the projection of the output gate (as `hla.distributed` starts
    it), and of the two in the backward pass the first one behind a walk over the keys; halos hide behind nothing;
    FSDP2's collectives behind all of compute; the hops of a ring behind its attention, whose work is shared evenly;
    Ulysses' exchanges behind nothing.
    With checkpointing everything forward is done twice.

    Args:
        method: "hla", "ring" or "ulysses". The last two are the same model with softmax attention for a mixer; what
            lies between the products is taken to be the same.

    Returns:
        None where Ulysses has fewer heads than ranks.
    """
    local, layers, again = tokens / sp, config.num_hidden_layers, 1 if checkpointing else 0
    products = layers * block_products(config) * (3 + again) * local / rates.matmul
    # `hla.loss` makes the logits again in the backward pass; float32 logits pass through memory about six times.
    V = config.vocab_size
    products += local * (4 * 2 * config.hidden_size * V / rates.matmul + 6 * formulas.F32 * V / rates.copy)
    between = layers * rates.between(size, config) * (1 + BACKWARD + again) * local
    summaries = 0.0
    if method == "hla":
        forward, both = rates.mixer(config.op, config, round(local))
        mixer = layers * (both + again * forward)
        if sp > 1:
            summaries = layers * (summary_seconds(config, rates, local, again) + fold_seconds(config, rates, sp, again))
        exposed = layers * hla_exposed(config, rates, links, sp, local, again)
    else:
        forward, both = (x / sp for x in rates.mixer("softmax", config, tokens))
        mixer = layers * (both + again * forward)
        if method == "ring":
            received = formulas.ring_layer(config, sp, tokens, checkpointing=checkpointing).total
            hidden = both + again * forward
            exposed = layers * max(0.0, links.ring(received, sp) - hidden)
        else:
            traffic = formulas.ulysses_layer(config, sp, tokens, checkpointing=checkpointing)
            if traffic is None:
                return None
            exposed = layers * links.exchange(traffic.total, sp) if sp > 1 else 0.0
    sharded = formulas.fsdp_step(config, ranks)
    fsdp = sum(links.gather(x, ranks) for x in (sharded.all_gather, sharded.reduce_scatter))
    compute = products + between + mixer + summaries
    return Step(products, between, mixer, summaries, exposed + max(0.0, fsdp - compute))


def hla_exposed(config: HLAConfig, rates: Rates, links: Links, sp: int, local: float, again: int) -> float:
    """Seconds per layer that a rank waits for summaries and halos."""
    if sp == 1:
        return 0.0
    told, halo = (sp - 1) * formulas.summary_bytes(config), (sp - 1) * formulas.halo_bytes(config)
    gate = 2 * config.hidden_size * config.num_attention_heads * config.head_v_dim * local / rates.matmul
    forward = max(0.0, links.gather(told, sp) - gate) + links.gather(halo, sp)
    if formulas.by_kernels(config):
        backward = told_back(config, rates, links, sp, local)
    else:
        backward = max(0.0, links.exchange(told, sp) - 2 * gate)
    return (1 + again) * forward + backward + links.exchange(halo, sp)


def chunk_states(config: HLAConfig, heads: int, local: float) -> float:
    """Bytes of the states between chunks of a piece (`hla.kernels.query_side`), bfloat16."""
    return local / 64 * heads * config.head_dim**2 * formulas.BF16


def told_back(config: HLAConfig, rates: Rates, links: Links, sp: int, local: float) -> float:
    """Seconds of waiting, backward: for the gradient of P, less the walk of S that runs meanwhile, then that of S."""
    half = (sp - 1) * formulas.summary_bytes(config) / 2
    walk = chunk_states(config, config.num_key_value_heads, local) / rates.copy
    return max(0.0, links.gather(half, sp) - walk) + links.gather(half, sp)


def summary_seconds(config: HLAConfig, rates: Rates, local: float, again: int) -> float:
    """What a piece computes beyond what it computes alone.

    By the kernels of hla_q, whose summaries are sums they make anyway: what the chunks add to the gradient of S is read
    once more. Otherwise k and v are read for the moments k k^T and k v^T (`hla.kernels.moment`), bfloat16; back again,
    and their gradients written and added to the others.
    """
    HKV, K, V = config.num_key_value_heads, config.head_dim, config.head_v_dim
    if formulas.by_kernels(config):
        return chunk_states(config, config.num_attention_heads, local) / rates.copy
    tensors = 1 + again + 2 + 3
    return local * tensors * 2 * HKV * (K + V) / rates.copy


def fold_seconds(config: HLAConfig, rates: Rates, sp: int, again: int) -> float:
    """Of what all ranks told, on the last one.

    By the kernels of hla_q: one pass over it each way, and sums over segments before and after. Otherwise a weighted
    sum: a product and a sum, forward; backward their gradients, that of the weights, and both put together with zeros
    where this rank's own summary and later ones are.
    """
    if formulas.by_kernels(config):
        passes, kernels = (1 + again) + 1, 6 * (1 + again) + 6
    else:
        passes, kernels = 3 * (1 + again) + 9, 12 * (1 + again) + 24
    return kernels * SMALL_KERNEL + passes * (sp - 1) * formulas.summary_bytes(config) / rates.copy
