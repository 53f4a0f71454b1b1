"""Checks of what users pass in: every message names the argument, says what it is and what was expected.

Shapes, dtypes, devices and kinds are always checked. Values (g > 0, cu_seqlens not monotonic, ...) are checked on CPU
tensors always, on GPU tensors only when the environment has ``HLA_CHECK=1``: reading a value waits for the GPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hla.ops.family import OPS
from hla.ops.state import State, is_packed, packed_shape, state_class, zeros

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_STEP_TOKENS = 8  # of one call of hla.step
HAS_TRITON = importlib.util.find_spec("triton") is not None
HLA_Q_ORDER = 4  # the default number of readings of S


@dataclass
class Call:
    """One checked call of an operator: what `higher_order`, `recurrent` and the kernels compute from."""

    op: str
    order: int | None
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    p: Tensor
    ridge: float | Tensor
    gain: float | Tensor
    value_ridge: float | Tensor
    value_gain: float | Tensor
    scale: float
    normalize: bool
    eps: float
    initial_state: State | None
    output_final_state: bool
    cu_seqlens: Tensor | None
    nodes: Tensor | None = None  # of hla_q: [B, T, HQ, order + 1]

    def shaping(self, which: str | None) -> tuple[float | Tensor, float | Tensor]:
        """(gain, ridge) of a `Reading`."""
        if which is None:
            return 1.0, 0.0
        return (self.gain, self.ridge) if which == "gain" else (self.value_gain, self.value_ridge)


def check_call(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int | None = None,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: float | Tensor | None = None,
    gain: float | Tensor = 1.0,
    value_ridge: float | Tensor = 0.0,
    value_gain: float | Tensor = 1.0,
    nodes: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    step: bool = False,
    slots: int | None = None,
    state_name: str = "initial_state",
) -> Call:
    """Checks the arguments of an operator (``step``: of `hla.step`, whose tensors need no time dimension)."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    order = _check_order(op, order)
    if ridge is None:  # the operator's default
        ridge = 1.0 if op == "hla_q" else 0.0
    values = dict(value_ridge=value_ridge, value_gain=value_gain)
    _refuse_unread(op, p, dict(ridge=ridge, gain=gain), values, nodes, normalize)
    one_token = step and isinstance(q, Tensor) and q.dim() != 4
    lead = ("B",) if one_token else ("B", "T")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _tensor(name, x)
        if x.dim() != len(lead) + 2:
            several = " or, for several tokens, [B, T, heads, dim]" if one_token and x is q else ""
            raise ValueError(f"{name} must have shape [{', '.join(lead)}, heads, dim]{several}; got {_shape(x)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {x.dtype}")
        _same("dtype", name, x.dtype, "q", q.dtype, TypeError)
        _same("device", name, x.device, "q", q.device, ValueError)
        if x.shape[: len(lead)] != q.shape[: len(lead)]:
            raise ValueError(f"{name} must have the {' and '.join(lead)} of q, {_shape(q)}; got {_shape(x)}")
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have 1 to {MAX_HEAD_DIM} numbers per head; got {_shape(x)}")
    if step and not one_token and not 1 <= q.shape[1] <= MAX_STEP_TOKENS:
        raise ValueError(
            f"hla.step takes 1 to {MAX_STEP_TOKENS} tokens in one call; got T = {q.shape[1]} (for more there is "
            f"hla.{op} with initial_state and output_final_state=True)"
        )
    hq, hkv = q.shape[-2], k.shape[-2]
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head dimension of q, {q.shape[-1]}; got {_shape(k)}")
    if v.shape[-2] != hkv:
        raise ValueError(f"v must have the {hkv} heads of k; got {_shape(v)}")
    if hkv < 1 or hq < 1 or hq % hkv:
        raise ValueError(f"the heads of q ({hq}) must be a multiple of the heads of k and v ({hkv})")

    if g is not None:
        _tensor("g", g)
        _expect_shape("g", g, (*q.shape[:-2], hkv), f"[{', '.join(lead)}, heads of k]")
        if g.dtype != torch.float32 and not (g.dtype == torch.float64 == q.dtype):
            raise TypeError(f"g (log-decay) must be float32 (or float64 with float64 q, k, v); got {g.dtype}")
        _same("device", "g", g.device, "q", q.device, ValueError)
        # NaN goes through, as it does in q, k and v: a training run that diverged shall see it in its loss.
        if _values_readable(g) and bool(((g > 0) | g.isinf()).any()):
            raise ValueError("g is the logarithm of a decay: it must be finite and <= 0 everywhere")

    p = _check_p(p, q, k, lead)
    shaping: dict[str, float | Tensor] = {
        "ridge": ridge,
        "gain": gain,
        "value_ridge": value_ridge,
        "value_gain": value_gain,
    }
    for name, value in shaping.items():
        shaping[name] = _check_per_token(name, value, p, lead)
    if op == "hla_q":
        _check_positive("ridge", shaping["ridge"])
        assert order is not None
        if nodes is not None or not step:  # (a step makes Chebyshev's itself)
            nodes = _check_nodes(nodes, order, q)
    if scale is None:
        # What least squares reads has the size of v; a sum of products wants to be scaled.
        scale = 1.0 if op == "hla_q" else q.shape[-1] ** -0.5
    scale = _number("scale", scale)
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False; got {normalize!r}")
    eps = _number("eps", eps)
    if eps < 0 or (normalize and eps == 0):
        raise ValueError(f"eps must be positive; got {eps}")
    if not isinstance(output_final_state, bool):
        raise TypeError(f"output_final_state must be True or False; got {output_final_state!r}")

    sequences = q.shape[0]
    if cu_seqlens is not None:
        sequences = _check_cu_seqlens(cu_seqlens, q)
    call = Call(
        op, order, q, k, v, g, p, shaping["ridge"], shaping["gain"], shaping["value_ridge"], shaping["value_gain"],
        scale, normalize, eps, initial_state, output_final_state, cu_seqlens, nodes,
    )  # fmt: skip
    if initial_state is not None:
        check_state(call, initial_state, sequences if slots is None else slots, state_name, may_be_packed=step)
    return call


def check_state(call: Call, state: State, batch: int, name: str, may_be_packed: bool = False) -> None:
    """Raises unless ``state`` is a state of this operator, these heads and this ``normalize``, with ``batch`` rows."""
    cls: Any = state_class(call.op, call.order)
    if not isinstance(state, cls):
        raise TypeError(f"{name} of {call.op} must be a {cls.__name__}; got {type(state).__name__}")
    packed = is_packed(state)
    if packed and not may_be_packed:
        raise ValueError(f"{name}.S is packed, which only hla.step takes: use {name}.unpack()")
    expected = zeros(
        call.op, batch, call.q.shape[-2], call.k.shape[-2], call.q.shape[-1], call.v.shape[-1],
        order=call.order, p_heads=call.p.shape[-2], normalize=call.normalize, device="meta",
        dtype=torch.float64 if call.q.dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    for field, x, want in zip(cls._fields, state, expected, strict=True):
        where = f"{name}.{field}"
        if x is None or want is None:
            if x is want:
                continue
            if field in ("m", "n"):
                made = "without" if x is None else "with"
                raise ValueError(f"{name} was made {made} normalize=True, this call has normalize={call.normalize}")
            raise ValueError(f"{where} must {'not ' if want is None else ''}be given for order {call.order}")
        _tensor(where, x)
        shape = tuple(want.shape)
        if packed and field == "S":
            shape = (*shape[:2], *packed_shape(shape[-1]))
        _expect_shape(where, x, shape, "of this operator and these heads")
        if x.dtype != want.dtype and (x.dtype, want.dtype) != (torch.bfloat16, torch.float32):
            raise TypeError(f"{where} must be {want.dtype}; got {x.dtype}")
        _same("device", where, x.device, "q", call.q.device, ValueError)


def check_backend(backend: str | None) -> None:
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton'; got {backend!r}")


def check_state_indices(indices: Tensor, batch: int, slots: int, device: torch.device) -> None:
    _tensor("state_indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_indices must be int32 or int64; got {indices.dtype}")
    _expect_shape("state_indices", indices, (batch,), "[B]")
    _same("device", "state_indices", indices.device, "q", device, ValueError)
    if _values_readable(indices) and batch:
        if int(indices.min()) < 0 or int(indices.max()) >= slots:
            raise ValueError(f"state_indices must lie in 0 .. {slots - 1}; got {indices.tolist()}")
        if indices.unique().numel() < batch:
            raise ValueError(f"state_indices must not name a slot twice; got {indices.tolist()}")


def _refuse_unread(op: str, p: Any, keys: dict[str, Any], values: dict[str, Any], nodes: Any, normalize: Any) -> None:
    """An argument that the operator does not read must be left at its default."""
    given = dict(values) if op != "hla3" else {}
    if op in ("linear_attn", "hla_q"):
        given |= keys
        if p is not None and not (isinstance(p, str) and p == "q"):
            raise ValueError(f"{op} has no inner query: p must be left out")
    if op == "hla_q":
        del given["ridge"]
        if normalize:
            raise ValueError("hla_q is a least-squares read-out and has no normalised form: normalize must be False")
    elif nodes is not None:
        raise ValueError(f"{op} does not read nodes: it must be left out")
    for name, x in given.items():
        default = 1.0 if name.endswith("gain") else 0.0
        if not isinstance(x, (int, float)) or x != default:
            raise ValueError(f"{op} does not read {name}: it must be left out")


def _check_order(op: str, order: int | None) -> int | None:
    if op in ("linear_attn", "hla2", "hla3"):
        if order is not None:
            raise ValueError(f"{op} has no argument order; hla_n, ahla and hla_q have")
        return None
    if order is None:
        if op == "hla_n":
            raise ValueError("hla_n needs the argument order")
        return {"ahla": 2, "hla_q": HLA_Q_ORDER}[op]
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an integer; got {order!r}")
    if order < 1:
        raise ValueError(f"order must be at least 1; got {order}")
    return order


def _check_positive(name: str, x: float | Tensor) -> None:
    if isinstance(x, float):
        bad = x <= 0
    else:
        bad = _values_readable(x) and bool((x <= 0).any())
    if bad:
        raise ValueError(f"{name} must be positive{'' if isinstance(x, Tensor) else f'; got {x}'}")


def _check_nodes(nodes: Tensor | None, order: int, q: Tensor) -> Tensor:
    """Nodes as ``[B, T, HQ, order + 1]`` (``[B, HQ, order + 1]`` for one token), a view without a copy."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    full = (*q.shape[:-1], order + 1)
    if nodes is None:
        return chebyshev_nodes(order, wide, q.device).expand(full)  # made there: no copy waits for a GPU
    _tensor("nodes", nodes)
    if nodes.dtype not in FLOATS:
        raise TypeError(f"nodes must be a floating-point tensor; got {nodes.dtype}")
    _same("device", "nodes", nodes.device, "q", q.device, ValueError)
    if tuple(nodes.shape) not in (full[-1:], full[-2:], full):
        shapes = ", ".join(map(str, map(list, (full[-1:], full[-2:], full))))
        raise ValueError(f"nodes must have one of the shapes {shapes} (order + 1 nodes); got {_shape(nodes)}")
    if _values_readable(nodes) and bool(((nodes < 0) | nodes.isinf()).any()):
        raise ValueError("nodes must be finite and >= 0: they are parts of the trace of S")
    return nodes.to(wide).expand(full)


def chebyshev_nodes(order: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
    """The ``order + 1`` nodes of ``[0, 1]``, ``(1 - cos(pi (n + 1/2) / (order + 1))) / 2``, smallest first.

    The order of the steps changes rounding only: long steps (small nodes) magnify what came before them, so they come
    first. Largest first, the rounding errors of order 8 are some 30 times as large.
    """
    n = torch.arange(order + 1, dtype=dtype, device=device)
    return 0.5 - 0.5 * torch.cos(math.pi * (n + 0.5) / (order + 1))


def _check_p(p: str | Tensor | None, q: Tensor, k: Tensor, lead: tuple[str, ...]) -> Tensor:
    if p is None or (isinstance(p, str) and p == "q"):
        return q
    if isinstance(p, str):
        if p != "k":
            raise ValueError(f"p (inner query) must be 'q', 'k' or a tensor; got {p!r}")
        return k
    _tensor("p", p)
    expected = f"[{', '.join(lead)}, {q.shape[-2]} or {k.shape[-2]} heads, {q.shape[-1]}]"
    good_heads = p.dim() == q.dim() and p.shape[-2] in (q.shape[-2], k.shape[-2])
    if not good_heads or p.shape[-1] != q.shape[-1] or p.shape[:-2] != q.shape[:-2]:
        raise ValueError(f"p must have shape {expected}; got {_shape(p)}")
    _same("dtype", "p", p.dtype, "q", q.dtype, TypeError)
    _same("device", "p", p.device, "q", q.device, ValueError)
    return p


def _check_per_token(name: str, x: float | Tensor, p: Tensor, lead: tuple[str, ...]) -> float | Tensor:
    if not isinstance(x, Tensor):
        return _number(name, x, "a number or a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating-point tensor; got {x.dtype}")
    _expect_shape(name, x, tuple(p.shape[:-1]), f"[{', '.join(lead)}, heads of p]")
    _same("device", name, x.device, "q", p.device, ValueError)
    # These are few numbers that scale whole keys: they are never rounded to the dtype of the operands.
    return x.to(torch.float64 if p.dtype == torch.float64 else torch.float32)


def _check_cu_seqlens(cu: Tensor, q: Tensor) -> int:
    _tensor("cu_seqlens", cu)
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64; got {cu.dtype}")
    if cu.dim() != 1 or cu.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1 sequences; got {_shape(cu)}")
    _same("device", "cu_seqlens", cu.device, "q", q.device, ValueError)
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs packed sequences in one row, B = 1; q is {_shape(q)}")
    if _values_readable(cu):
        if int(cu[0]) != 0:
            raise ValueError(f"cu_seqlens must start at 0; got {int(cu[0])}")
        if int(cu[-1]) != q.shape[1]:
            raise ValueError(f"cu_seqlens must end at T = {q.shape[1]}; got {int(cu[-1])}")
        if bool((cu.diff() < 0).any()):
            raise ValueError("cu_seqlens must not decrease")
    return cu.numel() - 1


def _values_readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or (x.device.type != "meta" and os.environ.get("HLA_CHECK") == "1")


def _number(name: str, x: float, expected: str = "a number") -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be {expected}; got {type(x).__name__}")
    if x != x or abs(x) == math.inf:  # math.isfinite, for torch.compile(dynamic=True)
        raise ValueError(f"{name} must be finite; got {x}")
    return float(x)


def _tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _expect_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({meaning}); got {_shape(x)}")


def _same(what: str, name: str, got: object, other: str, expected: object, error: type[Exception]) -> None:
    if got != expected:
        raise error(f"{name} must have the {what} of {other}, {expected}; got {got}")
