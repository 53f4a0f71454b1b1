"""The arms: every mixer under comparison, by name, and the tracks in which they meet.

An arm is a function ``(hidden_size, num_heads, head_dim, head_v_dim) -> mixer`` with its options in a dictionary, so
that a row of the results says what was built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.quality import mixers
from hla.layers import HigherOrderLinearAttention


@dataclass(frozen=True)
class Arm:
    """A mixer class and its options. ``parts``: arms whose heads stand side by side (`mixers.MixedOrders`)."""

    mixer: type[nn.Module] = HigherOrderLinearAttention
    options: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def build(self, hidden_size: int, heads: int, head_dim: int, head_v_dim: int) -> nn.Module:
        if self.parts:
            share = heads // len(self.parts)
            return mixers.MixedOrders(*(ARMS[p].build(hidden_size, share, head_dim, head_v_dim) for p in self.parts))
        return self.mixer(hidden_size, heads, None, head_dim, head_v_dim=head_v_dim, **self.options)


def public(op: str, **options: Any) -> Arm:
    return Arm(options={"op": op, "decay": "none", **options})


def moments(**options: Any) -> Arm:
    return Arm(mixers.MomentPolynomial, options)


PLAIN = {"ridge": 0.0, "gain": 1.0}
PLAIN3 = {**PLAIN, "value_ridge": 0.0, "value_gain": 1.0}
ZERO_MEAN = {"feature_map": "identity"}
GATE = {"decay": "token"}

# The most deciding comparisons first: this is the order in which they run.
ARMS: dict[str, Arm] = {
    # Peers.
    "softmax": Arm(mixers.Softmax, {"feature_map": "identity", "qk_norm": "rms"}),
    "linear": public("linear_attn"),
    "linear, gate": public("linear_attn", **GATE),
    "DeltaNet": Arm(mixers.DeltaRule),
    "GatedDeltaNet": Arm(mixers.DeltaRule, GATE),
    "GatedDeltaNet, identity": Arm(mixers.DeltaRule, {**GATE, **ZERO_MEAN}),
    # Protecting, overwriting, both, with a small second-order term; weighted: every token decides how much it counts.
    "protecting": public("hla2"),
    "overwriting": public("ahla"),
    "both": public("hla3"),
    "protecting, weighted": Arm(mixers.WriteGated, {"op": "hla2"}),
    "overwriting, weighted": Arm(mixers.WriteGated, {"op": "ahla"}),
    "both, weighted": Arm(mixers.WriteGated, {"op": "hla3"}),
    # Polynomials of S, and what they approach.
    "query 1": moments(query=1),
    "query 2": moments(query=2),
    "query 4": moments(query=4),
    "query 8": moments(query=8),
    "exact": moments(exact=True),
    # The paper's operators.
    "hla2": public("hla2", p="q", **PLAIN),
    "ahla": public("ahla", p="q", **PLAIN),
    "hla3": public("hla3", p="q", **PLAIN3),
    "hla3 published": Arm(mixers.PublishedHLA3),
    # The inner query, without and with a first-order residual.
    "hla2, p=k": public("hla2", p="k", **PLAIN),
    "hla2, p=proj": public("hla2", p="proj", **PLAIN),
    "hla2, p=q, residual": public("hla2", p="q", ridge="token", gain="token"),
    "hla2, p=k, residual": public("hla2", p="k", ridge="token", gain="token"),
    # Zero-mean features.
    "linear, identity": public("linear_attn", **ZERO_MEAN),
    "protecting, identity": public("hla2", **ZERO_MEAN),
    "both, identity": public("hla3", **ZERO_MEAN),
    "both, weighted, identity": Arm(mixers.WriteGated, {"op": "hla3", **ZERO_MEAN}),
    "query 4, identity": moments(query=4, **ZERO_MEAN),
    "exact, identity": moments(exact=True, **ZERO_MEAN),
    "DeltaNet, identity": Arm(mixers.DeltaRule, ZERO_MEAN),
    # Other nodes and coefficients of the polynomials, the key side, gates.
    "query 2 Richardson": moments(query=2, nodes="richardson"),
    "query 4 Richardson": moments(query=4, nodes="richardson"),
    "query 8 Richardson": moments(query=8, nodes="richardson"),
    "query 4, short reach": moments(query=4, reach=0.3),
    "query 4, per token": moments(query=4, token_nodes=True, token_ridge=True),
    "query 4, token ridge": moments(query=4, token_ridge=True),
    "query 4, token ridge, gate": moments(query=4, token_ridge=True, **GATE),
    "query 4, token nodes": moments(query=4, token_nodes=True),
    "query 2, per token, gate": moments(query=2, token_nodes=True, token_ridge=True, **GATE),
    "query 4, per token, gate": moments(query=4, token_nodes=True, token_ridge=True, **GATE),
    "query 4, unweighted": moments(query=4, write_gate=False),
    "query 4, gate": moments(query=4, **GATE),
    "key 1": moments(key=1),
    "key 3": moments(key=3),
    "query 2 + key 1": moments(query=2, key=1),
    "both, gate": public("hla3", **GATE),
    "both, weighted, gate": Arm(mixers.WriteGated, {"op": "hla3", **GATE}),
    # The delta rule's own size, and more terms of its Neumann series.
    "protecting, own size": Arm(mixers.WriteGated, {"op": "hla2", "own_size": True, "keys": False}),
    "overwriting, own size": Arm(mixers.WriteGated, {"op": "ahla", "own_size": True, "keys": False}),
    "both, own size": Arm(mixers.WriteGated, {"op": "hla3", "own_size": True, "keys": False}),
    "both, weighted, own size": Arm(mixers.WriteGated, {"op": "hla3", "own_size": True}),
    "Neumann 3": Arm(mixers.NeumannDeltaRule, {"order": 3}),
    "Neumann 4": Arm(mixers.NeumannDeltaRule, {"order": 4}),
    "Neumann 4, own size": Arm(mixers.NeumannDeltaRule, {"order": 4, "own_size": True}),
    # The query side as the public layer has it ("query 4, token ridge" is the same mixer in quadratic form).
    "hla_q": public("hla_q"),
    "hla_q, gate": public("hla_q", **GATE),
    "hla_q, token nodes, gate": public("hla_q", nodes="token", ridge="head", **GATE),
    "hla_q 2": public("hla_q", order=2),
    "softmax, RoPE": Arm(mixers.Softmax, {"feature_map": "identity", "qk_norm": "rms", "rope_theta": 10_000.0}),
    # k~ normalised, S from keys of its own, orders side by side (half of the heads each).
    "hla2, p=k, |k~|=1": Arm(mixers.NormalisedKeys, {"inner": "k", "norm": "l2"}),
    "hla2, p=k, |k~|=1, identity": Arm(mixers.NormalisedKeys, {"inner": "k", "norm": "l2", **ZERO_MEAN}),
    "hla2, p=k, k~/count, identity": Arm(mixers.NormalisedKeys, {"inner": "k", "norm": "count", **ZERO_MEAN}),
    "protecting, own S": Arm(mixers.OwnMoment),
    "linear + protecting": Arm(parts=("linear", "protecting")),
    "linear + both": Arm(parts=("linear", "both")),
    "linear + query 4": Arm(parts=("linear", "query 4")),
}
