"""One token of a layer on a CPU, in place: what `HigherOrderLinearAttention.forward` computes, in fewer operations.

Where weights are read at the speed of memory (`hla.projection`), a third of a token's time is starting operations on a
few thousand numbers each, and waking threads for them. So q and k are shaped together, the convolution is one sum over
its window, the state is written where it is, and what the layer itself has made is not checked again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hla.layers import FEATURE_MAPS
from hla.ops.checks import Call
from hla.ops.recurrent import update
from hla.ops.state import HLAQState, zeros
from hla.projection import project

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention, LayerState

PIECE = 2**15 - 1  # numbers on which PyTorch works in one thread, without waking others
PIECES = 4  # beyond that, the threads are worth it


def fits(mixer: HigherOrderLinearAttention, x: Tensor, state: LayerState) -> bool:
    """Whether `token` does this layer for ``x [B, T, hidden_size]``, neither masked nor packed, and this state.

    Of those on a CPU, without gradients and not to be compiled, which the layer asks before it imports this module.
    """
    if x.shape[1] != 1 or x.dtype not in (torch.float32, torch.float64):
        return False
    if mixer.rope_theta is not None or mixer.sequence_parallel is not None or torch.is_autocast_enabled("cpu"):
        return False
    shapes = _state_shapes(
        mixer.op, x.shape[0], mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.head_v_dim,
        mixer.num_kv_heads if mixer.p in ("k", "proj") else mixer.num_heads, mixer.normalize,
    )  # fmt: skip
    # (One that does not fit goes to `hla.step`, which says why; or takes it, packed or in bfloat16.)
    held = [part for part in state.op if part is not None]
    return [part.shape for part in held] == shapes and all(part.dtype == x.dtype for part in held)


@functools.cache
def _state_shapes(
    op: str, batch: int, heads: int, kv_heads: int, K: int, V: int, p_heads: int, normalize: bool
) -> list[torch.Size]:
    state = zeros(op, batch, heads, kv_heads, K, V, p_heads=p_heads, normalize=normalize, device="meta")
    return [part.shape for part in state if part is not None]


def token(layer: HigherOrderLinearAttention, x: Tensor, state: LayerState) -> Tensor:
    """The layer's output ``[B, 1, hidden_size]`` for a token that `fits`; advances its state in place."""
    mixer: Any = layer
    y = project(mixer.qkv_proj, x)[:, 0]
    if state.conv is not None:
        window = torch.cat([state.conv, y[..., None]], -1)
        state.conv.copy_(window[..., 1:])
        y = (window * mixer.conv_weight).sum(-1)
    q_size, k_size, v_size = mixer.split_sizes[:3]
    qk, v, own = y.tensor_split([q_size + k_size, q_size + k_size + v_size], -1)
    q, k = _shape(mixer, qk).split([mixer.num_heads, mixer.num_kv_heads], 1)
    v = v.unflatten(-1, (-1, mixer.head_v_dim))
    if mixer.write_gate:
        share = torch.sigmoid(mixer.write_proj(x)).mT.sqrt()
        k, v = k * share, v * share
    p = k if mixer.p == "k" else _shape(mixer, own) if mixer.p == "proj" else q

    g = mixer._log_decay(x, None)
    options: dict[str, Any] = {"ridge": 0.0, "gain": 1.0, "value_ridge": 0.0, "value_gain": 1.0, "nodes": None}
    for name, part in mixer._coefficients(x, k[:, None]).items():
        # (nodes per head have no dimension of time)
        options[name] = part[:, 0] if isinstance(part, Tensor) and part.dim() > 2 else part
    call = Call(
        mixer.op, {"hla_q": mixer.order, "ahla": 2}.get(mixer.op), q, k, v, None if g is None else g[:, 0], p,
        scale=mixer.scale, normalize=mixer.normalize, eps=1e-6, initial_state=None, output_final_state=True,
        cu_seqlens=None, **options,
    )  # fmt: skip
    if isinstance(state.op, HLAQState) and _fits_pieces(call, state.op):
        o = _update_in_pieces(call, state.op)
    else:
        o, _ = update(call, state.op, in_place=True)

    if mixer.o_norm is not None:
        o = mixer.o_norm(o)
    o = o.flatten(1)[:, None]
    gate = mixer._gate_logits(x)
    return project(mixer.o_proj, o if gate is None else o * F.silu(gate))


def _shape(mixer: Any, x: Tensor) -> Tensor:
    """Feature map and normalisation of heads, ``[B, heads, head_dim]``."""
    return mixer._normalised(FEATURE_MAPS[mixer.feature_map](x).unflatten(-1, (-1, mixer.head_dim)))


def _heads_per_piece(state: HLAQState) -> int:
    S, P = state
    return PIECE // (S.shape[2] * max(S.shape[2], P.shape[3]))


def _fits_pieces(call: Call, state: HLAQState) -> bool:
    S, P = state
    one_query_each = call.q.shape[1] == call.k.shape[1]
    if torch.get_num_threads() == 1 or not one_query_each or call.g is None or call.nodes is None:
        return False
    return S.is_contiguous() and P.is_contiguous() and S.shape[0] * S.shape[1] <= PIECES * _heads_per_piece(state)


def _update_in_pieces(call: Call, state: HLAQState) -> Tensor:
    """`update` in pieces of a few heads, and products written out: no thread is woken for any of it.

    Waking one takes longer (10 microseconds; 50 on a busy machine) than an operation on the whole state, and `update`
    wakes it nine times.
    """
    assert call.g is not None and call.nodes is not None
    heads = _heads_per_piece(state)
    q, k, v = (x.flatten(0, 1) for x in (call.q, call.k, call.v))
    S, P = (x.flatten(0, 1).split(heads) for x in state)
    decay, key, value = call.g.exp().view(-1, 1, 1), k[..., None], v[:, None]
    for s, m, d, a, b in zip(S, P, *(x.split(heads) for x in (decay, key, value)), strict=True):
        s.mul_(d).addcmul_(a, a.mT)
        m.mul_(d).addcmul_(a, b)

    def read(x: Tensor, moment: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([(y * m).sum(1) for y, m in zip(x[..., None].split(heads), moment, strict=True)])

    # x_n = x_{n-1} + (q - (S + ridge I) x_{n-1}) / theta_n
    trace = state.S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
    ridge = call.ridge[..., None] if isinstance(call.ridge, Tensor) else call.ridge
    steps = 1 / (call.nodes * trace + ridge)
    kept = (1 - ridge * steps).flatten(0, 1)[..., None].unbind(1)
    steps = steps.flatten(0, 1)[..., None]
    x, *moves = (steps * q[:, None]).unbind(1)
    for move, keep, size in zip(moves, kept[1:], steps.unbind(1)[1:], strict=True):
        x = torch.addcmul(torch.addcmul(move, keep, x), size, read(x, S), value=-1)
    return read(x, P).view(call.v.shape) * call.scale
