"""What an operator must move and multiply, counted from formulas: the floor that a measured time is held against.

``floor = max(bytes / copy bandwidth, FLOPs / matmul rate)`` with both ceilings measured in the same run; gates and
other numbers per token are left out (below 1%).

**Bytes.** Sizes are in tensors ``[B, T, heads, D]``, with the heads of q or those of k. A forward pass reads q, k, v
and writes o: 4. Training keeps what later stages read (k~, v~) and walks back in two passes, one per direction, each
reading its operands once:

    linear_attn   forward q k v | o;  do k v | dq;  q k v do | dk dv                                       4 + 10 = 14
    hla2          forward q k v | o k~;  q k v k~ do | dk~ dk dv;  do v k~ dk~ k | dq                      5 + 14 = 19
    ahla          the same with v~ in the place of k~                                                     5 + 14 = 19
    hla3          forward q k v | o k~ v~;  q k v k~ v~ do | dk~ dv~ dk dv;  do k~ v~ dk~ dv~ k v | dq     6 + 18 = 24
    hla_q         forward q k v | o;  q k v do | dq;  q k v do | dk dv (what is in between costs nothing)  4 + 11 = 15
    softmax       forward q k v | o;  q k v o do | dq dk dv                                               4 +  8 = 12

**FLOPs.** Of the chunk form with C = 64 tokens and K = V = D, per token and head: a product within the chunk costs
``2 C D``, reading or writing a state ``2 D^2``. Operators count by their score matrices, readings and moments:

    forward    2 C D (scores + readings) + 2 D^2 (readings + moments)
    backward   2 C D (scores + 4 readings) + 2 D^2 (3 readings + 2 moments)

(backward: scores again, the gradient of the scores and three products with them; the states read for dq, dk and dv,
the moments again and their adjoints). Causal softmax attention costs ``2 T D`` forward and ``5 T D`` backward.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK = 64
BYTES = 2  # bfloat16


class Cost(NamedTuple):
    """Tensors moved, as (with the heads of q, with the heads of k); FLOPs by scores, readings, moments."""

    forward: tuple[int, int]
    both: tuple[int, int]
    scores: int
    readings: int
    moments: int


COSTS = {
    "linear_attn": Cost((2, 2), (6, 8), 1, 1, 1),
    "hla2": Cost((2, 2), (11, 8), 2, 2, 2),
    "ahla": Cost((2, 2), (11, 8), 1, 2, 2),
    "hla3": Cost((2, 2), (16, 8), 2, 3, 3),
    "hla_q": Cost((2, 2), (7, 8), 5, 5, 2),  # order 4
    "softmax": Cost((2, 2), (6, 6), 0, 0, 0),
}


def count(operator: str, tokens: int, length: int, heads: int, kv_heads: int, dim: int, both: bool) -> tuple[int, int]:
    """(bytes, FLOPs) of a forward pass, or of forward and backward.

    Args:
        operator: a key of `COSTS`. tokens: of the whole batch. length: of one sequence (softmax attention only).
    """
    cost = COSTS[operator]
    of_q, of_k = cost.both if both else cost.forward
    moved = BYTES * tokens * dim * (of_q * heads + of_k * kv_heads)
    if operator == "softmax":
        return moved, (7 if both else 2) * length * dim * tokens * heads
    inside, read, written = cost.scores + cost.readings, cost.readings, cost.moments
    if both:
        inside, read, written = inside + cost.scores + 4 * cost.readings, 4 * read, 3 * written
    return moved, tokens * (heads * (2 * CHUNK * dim * inside + 2 * dim**2 * read) + kv_heads * 2 * dim**2 * written)


def floor_ms(moved: float, flops: float, bandwidth: float, rate: float) -> float:
    """Milliseconds that no implementation with this count beats; bandwidth in bytes / s, rate in FLOP / s."""
    return 1e3 * max(moved / bandwidth, flops / rate)
