# mypy: ignore-errors
"""`shape`, `hla.step`, norm and gate of the heads for one token of hla_q in one launch, in Gluon: a program per
key/value head.

A head's convolution, features and norm need nothing of other heads, so what lies between the projections and the
operator is done where its results are wanted. S and P are asked for before the projections are there (`wait`). With few
heads in all a token waits for latency, not for bytes: S is in registers, laid out so that the sums ``S x``, which the
iterations wait for, run within a warp. All warps then need all of x, which costs one exchange through shared memory.
With many heads it waits for bytes: P goes to shared memory (MANY), so that one program of a multiprocessor loads while
another one iterates.

(Gluon is Triton with the layouts written down: see `query_side_hopper`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from hla.kernels.configs import block, device_config, has_gluon
from hla.kernels.launch import launch
from hla.kernels.query_side_hopper import _barrier, _copy
from hla.kernels.shape import FEATURES, NORMS
from hla.kernels.step import FEW_PROGRAMS, RESIDENT, TWO_PROGRAMS, _rows_are_contiguous

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention, LayerState


@gluon.jit
def _wait(PDL: gl.constexpr):
    """As `launch.wait`."""
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        asm: gl.constexpr = "griddepcontrol.launch_dependents; // $0"
        gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _exponential(x):
    """As `shape.exponential`."""
    asm: gl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=f,f", [x * 1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _softplus(x):
    """As `shape.softplus`."""
    e = gl.exp(gl.minimum(x, 20.0))
    u = 1.0 + e
    return gl.where(x > 20.0, x, gl.log(u) + (e - (u - 1.0)) / u)


@gluon.jit
def _featured(y, KIND: gl.constexpr):
    """As `shape.featured`, without the slope."""
    f = y
    if KIND == 1:
        r = gl.rsqrt(1.0 + _exponential(-y))
        f = y * (r * r)
    elif KIND == 2:
        f = gl.maximum(y, 0.0)
    elif KIND == 3:
        f = gl.where(y > 0, y + 1.0, gl.exp(gl.minimum(y, 0.0)))
    return f


@gluon.jit
def _known(HISTORY, TAPS, b, channels, channel, in_d, TAPS_N: gl.constexpr):
    """What the convolution of a head knows before the token comes: its window, and its taps."""
    window = ()
    taps = ()
    for i in gl.static_range(TAPS_N - 1):
        at = (b * channels + channel) * (TAPS_N - 1) + i
        window = window + (gl.load(HISTORY + at, mask=in_d, other=0.0),)
    for i in gl.static_range(TAPS_N):
        taps = taps + (gl.load(TAPS + channel * TAPS_N + i, mask=in_d, other=0.0).to(gl.float32),)
    return window, taps


@gluon.jit
def _convolved(x, known, live, HISTORY, b, channels, channel, in_d, TAPS_N: gl.constexpr, FEATURE: gl.constexpr):
    """The features of a head before their norm; its window moves on."""
    window, taps = known
    x = gl.where(live, x.to(gl.float32), 0.0)
    y = x
    if TAPS_N > 0:
        y = x * taps[TAPS_N - 1]
        everything = window + (x,)
        for i in gl.static_range(TAPS_N - 1):
            y += window[i] * taps[i]
            at = (b * channels + channel) * (TAPS_N - 1) + i
            gl.store(HISTORY + at, everything[i + 1], mask=in_d)
    f = _featured(y, FEATURE)
    if FEATURE == 3:
        f = gl.where(in_d, f, 0.0)
    return f


@gluon.jit
def _factor(row, gate, live, eps, NORM: gl.constexpr, K: gl.constexpr):
    """What the features of a head are multiplied by."""
    factor = gate
    if NORM == 1:
        factor = gl.rsqrt(gl.sum(row * row, 0) + eps) * gate
    elif NORM == 2:
        factor = gl.rsqrt(gl.sum(row * row, 0) / K + eps) * gate
    return gl.where(live, factor, 0.0)


@gluon.jit
def _number(X, at):
    if X is None:
        return 0.0
    else:
        return gl.load(X + at).to(gl.float32)


@gluon.jit
def _loaded(X, at, stop):
    """Numbers of X, if there is one, before ``stop``."""
    if X is None:
        return 1.0
    else:
        return gl.load(X + at, mask=at < stop, other=0.0).to(gl.float32)


@gluon.jit
def _nodes(LOGITS, head, ORDER: gl.constexpr):
    """As `step_kernels._node`."""
    found = ()
    for n in gl.static_range(ORDER + 1):
        if LOGITS is None:
            found = found + (0.5 - 0.5 * gl.cos((n + 0.5) * (3.141592653589793 / (ORDER + 1))),)
        else:
            logit = gl.load(LOGITS + head * (ORDER + 1) + n).to(gl.float32)
            found = found + (1.0 / (1.0 + gl.exp(-logit)),)
    return found


@gluon.jit
def shape_step_kernel(
    Y, MASK, HISTORY, TAPS, WRITE, DECAY, A_LOG, DT_BIAS, RIDGE_LOGIT, RIDGE_HEAD, NODE_LOGITS, S, P, GATE,
    O_NORM, OUT, y_r, write_r, decay_r, ridge_r, gate_r, S_b, P_b, eps, o_eps, ridge, scale,
    HQ: gl.constexpr, HKV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    TAPS_N: gl.constexpr, FEATURE: gl.constexpr, NORM: gl.constexpr, FIXED: gl.constexpr, ORDER: gl.constexpr,
    MANY: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Y: the token's projections ``[B, channels]``; see `shape._shape` and `step_kernels.query_side_kernel`.

    HISTORY, S and P move on in place. OUT: the heads, normed by O_NORM, times silu of GATE. MANY (K = BK, V = BV,
    HQ = HKV): P waits in shared memory, which leaves registers for two programs on a multiprocessor: memory is busy
    while one of them iterates.
    """
    gl.static_assert(not MANY or HQ == HKV)
    L: gl.constexpr = gl.BlockedLayout([BK // 8, 4], [8, 4], [1, WARPS], [1, 0])  # a warp has whole columns
    ROW: gl.constexpr = gl.SliceLayout(1, L)
    COLUMN: gl.constexpr = gl.SliceLayout(0, L)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SMALL: gl.constexpr = BK * (BK + BV) <= 8192
    GQ: gl.constexpr = HQ // HKV
    channels: gl.constexpr = (HQ + HKV) * K + HKV * V
    h = gl.program_id(0) % HKV
    b = (gl.program_id(0) // HKV).to(gl.int64)
    rows = gl.arange(0, BK, ROW)[:, None]
    columns, values = gl.arange(0, BK, COLUMN)[None, :], gl.arange(0, BV, COLUMN)[None, :]
    S += b * S_b + h * K * K
    P += b * P_b + h * K * V
    old_S = gl.load(S + (rows * K + columns), mask=(rows < K) & (columns < K), other=0.0).to(gl.float32)
    if MANY:
        LINES: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
        P_s = gl.allocate_shared_memory(P.dtype.element_ty, [BK, BV], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
        line = gl.arange(0, BK, gl.SliceLayout(1, LINES))[:, None]
        _copy(P_s, P + (line * V + gl.arange(0, BV, gl.SliceLayout(0, LINES))[None, :]))
        async_copy.commit_group()
    else:
        old_P = gl.load(P + (rows * V + values), mask=(rows < K) & (values < V), other=0.0).to(gl.float32)
    i_k, i_v = gl.arange(0, BK, ONE), gl.arange(0, BV, ONE)
    in_k, in_v = i_k < K, i_v < V
    q_at, k_at, v_at = h * GQ * K + i_k, (HQ + h) * K + i_k, (HQ + HKV) * K + h * V + i_v
    known_q = _known(HISTORY, TAPS, b, channels, q_at, in_k, TAPS_N)
    known_k = _known(HISTORY, TAPS, b, channels, k_at, in_k, TAPS_N)
    known_v = _known(HISTORY, TAPS, b, channels, v_at, in_v, TAPS_N)
    nodes = _nodes(NODE_LOGITS, h * GQ, ORDER)
    rate, shift, own = _number(A_LOG, h), _number(DT_BIAS, h), _number(RIDGE_HEAD, h * GQ)
    o_at = gl.arange(0, BV, COLUMN)
    if not MANY:
        o_factors = _loaded(O_NORM, o_at, V)
    before = gl.sum(gl.sum(gl.where(rows == columns, old_S, 0.0), 0), 0)  # the trace
    q_s = gl.allocate_shared_memory(gl.float32, [BK], SHARED)
    k_s = gl.allocate_shared_memory(gl.float32, [BK], SHARED)
    v_s = gl.allocate_shared_memory(gl.float32, [BV], SHARED)
    x_s = gl.allocate_shared_memory(gl.float32, [2, BK], SHARED)
    _wait(PDL)
    _barrier()  # whoever holds the same element of a window must have read it

    Y += b * y_r
    x_q, x_k = gl.load(Y + q_at, mask=in_k, other=0.0), gl.load(Y + k_at, mask=in_k, other=0.0)
    x_v = gl.load(Y + v_at, mask=in_v, other=0.0)
    write, logit = _number(WRITE, b * write_r + h), _number(DECAY, b * decay_r + h)
    ridge_logit = _number(RIDGE_LOGIT, b * ridge_r + h * GQ)
    live = b >= 0
    if MASK is not None:
        live = gl.load(MASK + b) != 0
    q_s.store(_convolved(x_q, known_q, live, HISTORY, b, channels, q_at, in_k, TAPS_N, FEATURE))
    k_s.store(_convolved(x_k, known_k, live, HISTORY, b, channels, k_at, in_k, TAPS_N, FEATURE))
    v_s.store(_convolved(x_v, known_v, live, HISTORY, b, channels, v_at, in_v, TAPS_N, 0))
    gate = 1.0
    if WRITE is not None:
        gate = gl.rsqrt(1.0 + gl.exp(-write))
    decay = 1.0
    if FIXED:
        decay = 1.0 - gl.exp2(-5.0 - h)
    elif DECAY is not None:
        decay = gl.exp(-gl.exp(rate) * _softplus(logit + shift))
    decay = gl.where(live, decay, 1.0)
    number: gl.constexpr = Y.dtype.element_ty
    k_row, k_column, v = k_s.load(ROW), k_s.load(COLUMN), v_s.load(COLUMN)
    factor = _factor(k_row, gate, live, eps, NORM, K)
    k_row = (k_row * factor).to(number).to(gl.float32)
    k_column = (k_column * factor).to(number).to(gl.float32)
    v = (v * gl.where(live, gate, 0.0)).to(number).to(gl.float32)
    new_S = decay * old_S + k_row[:, None] * k_column[None, :]
    trace = decay * before + gl.sum(k_row * k_row, 0)
    if not MANY:
        new_P = decay * old_P + k_row[:, None] * v[None, :]
    # At once, where that takes little or another program goes on; what passes between threads waits behind them.
    if MANY or SMALL:
        gl.store(S + (rows * K + columns), new_S.to(S.dtype.element_ty), mask=(rows < K) & (columns < K))
    if SMALL:
        gl.store(P + (rows * V + values), new_P.to(P.dtype.element_ty), mask=(rows < K) & (values < V))
    if MANY:
        k_s.store(k_column)  # for P, at the end: until then registers have no room for it
    for i in gl.static_range(GQ):
        head = h * GQ + i
        if i > 0:
            q_at = head * K + i_k
            known = _known(HISTORY, TAPS, b, channels, q_at, in_k, TAPS_N)
            x_q = gl.load(Y + q_at, mask=in_k, other=0.0)
            nodes = _nodes(NODE_LOGITS, head, ORDER)
            own, ridge_logit = _number(RIDGE_HEAD, head), _number(RIDGE_LOGIT, b * ridge_r + head)
            _barrier()  # as above
            q_s.store(_convolved(x_q, known, live, HISTORY, b, channels, q_at, in_k, TAPS_N, FEATURE))
        if not MANY:
            o_gate = _loaded(GATE, b * gate_r + head * V + o_at, b * gate_r + head * V + V)
        q_row, q = q_s.load(ROW), q_s.load(COLUMN)
        factor = _factor(q_row, 1.0, live, eps, NORM, K)
        q_row, q = (q_row * factor).to(number).to(gl.float32), (q * factor).to(number).to(gl.float32)
        least = ridge
        if RIDGE_HEAD is not None:
            least = gl.exp(gl.minimum(gl.maximum(own + ridge_logit, -12.0), 12.0))
        # theta_n x_n = q + (theta_n - ridge - S) x_{n-1}, and S is symmetric.
        theta = least + nodes[0] * trace
        x_row, x = q_row / theta, q / theta
        for n in gl.static_range(1, ORDER + 1):
            read = gl.sum(new_S * x_row[:, None], 0)
            x += (q - least * x - read) / (least + nodes[n] * trace)
            place = x_s.index(n % 2)
            place.store(x)
            x_row = place.load(ROW)
        if MANY:
            async_copy.wait_group(0)
            _barrier()
            new_P = decay * P_s.load(L) + k_s.load(ROW)[:, None] * v[None, :]
            gl.store(P + (rows * V + values), new_P)
            # (Now that there are registers for them.)
            o_factors = _loaded(O_NORM, o_at, V)
            o_gate = _loaded(GATE, b * gate_r + head * V + o_at, b * gate_r + head * V + V)
        o = scale * gl.sum(new_P * x_row[:, None], 0)
        if O_NORM is not None:
            o *= gl.rsqrt(gl.sum(o * o, 0) / V + o_eps) * o_factors
        if GATE is not None:
            o *= _featured(o_gate, 1)
        gl.store(OUT + (b * HQ + head) * V + o_at, o.to(OUT.dtype.element_ty), mask=o_at < V)
    if not (MANY or SMALL):
        gl.store(S + (rows * K + columns), new_S.to(S.dtype.element_ty), mask=(rows < K) & (columns < K))
        gl.store(P + (rows * V + values), new_P.to(P.dtype.element_ty), mask=(rows < K) & (values < V))


def fits(mixer: HigherOrderLinearAttention, state: LayerState, x: Tensor) -> bool:
    """Whether `shape_step` does this for the rows of x, in a layer that `shape.supports`.

    Registers hold S and P, or, where many programs come one after the other, S, and shared memory P.
    A state that is not this layer's does not fit; elsewhere it is refused by name.
    """
    B, kv, K, V = x.shape[0], mixer.num_kv_heads, mixer.head_dim, mixer.head_v_dim
    size = block(max(K, V))
    if mixer.op != "hla_q" or not has_gluon(device_config(x.device)[0]):
        return False
    S, P = state.op[:2]
    held = B * kv < FEW_PROGRAMS or (mixer.num_heads == kv and _shared_holds_P(S, P))
    if not (size <= 64 or (size <= RESIDENT and held)):
        return False
    conv = None if mixer.conv_size < 2 else (B, (mixer.num_heads + kv) * K + kv * V, mixer.conv_size - 1)
    return (
        S.shape == (B, kv, K, K) and P.shape == (B, kv, K, V)
        and all(x.dtype in (torch.float32, torch.bfloat16) and _rows_are_contiguous(x) for x in (S, P))
        and (conv is None or (state.conv is not None and state.conv.shape == conv and state.conv.is_contiguous()))
    )  # fmt: skip


def _shared_holds_P(S: Tensor, P: Tensor) -> bool:
    """Whether P can wait in shared memory."""
    whole = S.shape[-1] == P.shape[-1] == RESIDENT and S.dtype == P.dtype == torch.float32
    return whole and P.data_ptr() % 16 == 0 and P.stride(0) % 16 == 0


def shape_step(
    mixer: HigherOrderLinearAttention, parts: dict[str, Tensor], state: LayerState, mask: Tensor | None, pdl: bool
) -> Tensor:
    """What the output projection reads ``[B, HQ V]`` for one token of a layer that `fits`: normed and gated heads.

    The state moves on in place.

    Args:
        parts: the token's projections by the name of the map ``[B, n]``, rows in one piece.
        mask: ``[B, 1]``, 0 at pads, or None.
        pdl: overlap with the previous launch, which writes none of state and parameters.
    """
    qkv = parts["qkv_proj"]
    B, heads, kv, K, V = qkv.shape[0], mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.head_v_dim
    S, P = state.op[:2]
    by_token = mixer.decay == "token"
    own_ridge = mixer.coefficients["ridge"]
    write, decay, ridge, gate = (parts.get(f"{name}_proj") for name in ("write", "decay", "ridge", "gate"))
    norm = mixer.o_norm
    o = qkv.new_empty(B, heads * V)
    row = lambda x: 0 if x is None else x.stride(0)  # noqa: E731
    warps = max(1, max(block(K), block(V)) // 16)
    many = max(block(K), block(V)) > 64 and B * kv >= FEW_PROGRAMS
    launch(
        shape_step_kernel, B * kv,
        qkv, None if mask is None else mask.contiguous(), state.conv if mixer.conv_size > 1 else None,
        mixer.conv_weight if mixer.conv_size else None, write, decay, mixer.A_log if by_token else None,
        mixer.dt_bias if by_token else None, ridge,
        mixer.get_parameter("ridge_head") if isinstance(own_ridge, str) else None,
        mixer.node_logits if mixer.nodes == "head" else None, S, P, gate, None if norm is None else norm.weight, o,
        row(qkv), row(write), row(decay), row(ridge), row(gate), S.stride(0), P.stride(0),
        float(mixer.norm_eps), 0.0 if norm is None else float(norm.eps or 0.0),
        0.0 if isinstance(own_ridge, str) else float(own_ridge), mixer.scale,
        HQ=heads, HKV=kv, K=K, V=V, BK=block(K), BV=block(V), TAPS_N=mixer.conv_size,
        FEATURE=FEATURES[mixer.feature_map], NORM=NORMS[mixer.qk_norm], FIXED=mixer.decay == "fixed",
        ORDER=mixer.order, MANY=many, WARPS=warps, warps=warps, registers=TWO_PROGRAMS if many else None, pdl=pdl,
    )  # fmt: skip
    return o
