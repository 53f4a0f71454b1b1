"""Triton kernels: the same operators, faster. Nothing here is imported before a call asks for it.

- `linear_attn`: the primitive in one kernel, which walks the chunks of a segment with the state in registers; long
  sequences are split into segments whose entering states come from a first pass.
- `chain`: compositions of the primitive and their gradients as one `torch.library` operator.
- `query_side`: the readings of `hla_q` (its kernels in `query_side_kernels`).
- `fused`: second and third order in one kernel, at small heads. `step`: one token of any operator in one launch.
- `shape`: from a layer's projections to q, k, v and gates. `token`: one token of a whole block in a few launches
  (kernels: `token_kernels`), fewer on Hopper GPUs, where `shape_step` does all that belongs to a head at once.
- `shape_training`: the same with gradients. `gates`: what lies behind the operator, and the gate of the MLP.
- `moment`: the summaries of segments, for sequence parallelism.
- `configs`: block sizes and warps, by head size, dtype and device.
"""

from __future__ import annotations

from torch import Tensor

from hla.kernels import query_side
from hla.kernels.chain import chain
from hla.ops.checks import Call
from hla.ops.higher_order import compose
from hla.ops.query_side import compose_query_side
from hla.ops.state import State


def run(call: Call) -> tuple[Tensor, State | None]:
    """Any operator in chunk form."""
    if call.op != "hla_q":
        return compose(call, run=chain)
    return query_side.run(call) if query_side.supports(call) else compose_query_side(call, run=chain)
