"""The family on one page: every operator is linear attention whose keys and/or values went through linear attention.

An operator is a list of *readings* of the values. Each reading is one call of the primitive,

    x  <-  gain * scale * LA(query, keys, x; g)  +  ridge * x,

starting from ``x = v``; the last reading uses the outer query q, plain (gain 1, ridge 0), and gives the output.
Some readings use transformed keys, themselves one call of the primitive with gate 2g (see ``W W^T`` in `reference`):

    k~ =  gain * scale * LA(p, k, k; 2g)  +  ridge * p.

===========  =====================  =============================================  =======================
operator     definition             readings                                       state per head
===========  =====================  =============================================  =======================
linear_attn  W V                    (q, k)                                         P
hla2         tril(W W^T) V          (q, k~)                                        S, F
ahla         W^n V                  (p, k) n - 1 times, (q, k)                     P, E
hla3         tril(W W^T) W V        (p, k), (q, k~)                                S, P, F
hla_n even   tril(W W^T)^(n/2) V    (p, k~) n/2 - 1 times, (q, k~)                 S, F_1 ...
hla_n odd    the same on W V        (p, k), then as above                          S, P, F_1 ...
===========  =====================  =============================================  =======================

The state is one moment ``sum keys x^T`` per reading, plus ``S = sum k k^T`` where there are transformed keys.

A third switch transforms the query instead: ``hla_q`` reads S several times, ``q~ = (a polynomial of S_t) q_t``, and
then P once, as linear_attn does; its state is S, P for any order (see `query_side`).
"""

from __future__ import annotations

from typing import NamedTuple

OPS = ("linear_attn", "hla2", "ahla", "hla3", "hla_n", "hla_q")


class Reading(NamedTuple):
    """One reading of the values: which query reads which keys, and which arguments shape what it reads."""

    query: str  # "q" or "p"
    keys: str  # "k" or "k~"
    shaped_by: str | None = None  # "gain" (gain, ridge), "value_gain" (value_gain, value_ridge) or None (1, 0)


def readings(op: str, order: int | None) -> list[Reading]:
    """The readings of an operator, first to last."""
    outer = Reading("q", "k")
    outer_transformed = Reading("q", "k~")
    if op in ("linear_attn", "hla_q"):
        return [outer]
    if op == "hla2":
        return [outer_transformed]
    if op == "ahla":
        assert order is not None
        return [Reading("p", "k", "gain")] * (order - 1) + [outer]
    if op == "hla3":
        return [Reading("p", "k", "value_gain"), outer_transformed]
    assert op == "hla_n" and order is not None
    if order == 1:
        return [outer]
    first = [Reading("p", "k")] if order % 2 else []
    return first + [Reading("p", "k~")] * (order // 2 - 1) + [outer_transformed]


def transforms_keys(op: str, order: int | None) -> bool:
    """Whether the operator has k~, and so the state S."""
    return any(reading.keys == "k~" for reading in readings(op, order))
