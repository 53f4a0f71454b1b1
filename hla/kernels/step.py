"""`hla.step` as one kernel: a few tokens update the state and are answered from it in a single pass over memory.

Decoding moves the whole state once per call and computes next to nothing, so bytes are everything. One program owns
one key/value head of one row: it streams the head's moments in blocks of rows and uses every block for all it is good
for before it goes back. For hla2, rows i of S give the entries i of ``k~ = gain scale S p + ridge p``, with which rows
i of F are updated and then read by ``q_i``; nothing waits for the rest of S. So a block goes through all tokens of the
call while it is in registers. With grouped heads the program serves every query head of its group, so that S and P are
read and written once, and in place no other program can see them.

S is taken to be symmetric, as sums of ``k k^T`` are: its rows stand for its columns. Packed (`hla.ops.state.pack_S`),
only its tiles up to the diagonal are stored. Each of them is read once and multiplied by p from both sides, so an
entry of k~ is complete only after the last row of tiles: k~ of all tokens comes first, then F.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from hla.kernels.step_kernels import query_side_kernel, step_kernel
from hla.ops.checks import Call
from hla.ops.family import readings
from hla.ops.state import State, unpack, zeros

FEW_PROGRAMS = 132  # one to a multiprocessor of an H100: with fewer, a token waits for latency, not for bandwidth
RESIDENT = 128  # up to this K, hla_q holds S in registers
TWO_PROGRAMS = 128  # registers of a thread of 8 warps: one program of a multiprocessor loads while another one computes
# Whether a step overlaps with the launch before it, which then must not write the state (see `overlapping`).
_overlapping = contextvars.ContextVar("overlapping", default=False)


@contextlib.contextmanager
def overlapping(really: bool = True) -> Iterator[None]:
    """Steps in here, in place, ask for their state ahead of the previous launch's end: it must not write the state.

    (See `hla.kernels.launch`. Elsewhere a step may follow anything, and waits.)
    """
    token = _overlapping.set(really)
    try:
        yield
    finally:
        _overlapping.reset(token)


def supports(call: Call, *states: State | None) -> bool:
    """Whether there is a kernel for this call: at most one reading before the last, no float64, no gradient asked for.

    The kernels have no backward; states may have any leading stride, but each row in one piece.
    """
    c = call
    inner = readings(c.op, c.order)[:-1]
    inputs = (c.q, c.k, c.v, c.p, c.g, c.ridge, c.gain, c.value_ridge, c.value_gain, c.nodes)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    held = [x for state in states if state is not None for x in state if x is not None]
    return (
        [reading.keys for reading in inner] in ([], ["k"])
        and all(x.dtype != torch.float64 for x in (*tensors, *held))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *held)))
        and all(_rows_are_contiguous(x) for x in held)
    )


def fused_step(
    call: Call, state: State | None, out_state: State | None = None, state_indices: Tensor | None = None
) -> tuple[Tensor, State]:
    """`hla.step` of a checked call that `supports` accepts: ``(o, new state)``, in one launch.

    Args:
        state, out_state, state_indices: as in `hla.step`. A new state is made where no ``out_state`` is given.
    """
    c = call
    batch = c.q.shape[0]
    if out_state is None:
        if state_indices is not None:
            assert state is not None
            state = out_state = _copy(state, Tensor.clone)  # the rows that no index names stay what they were
        else:
            out_state = _fresh(c, batch) if state is None else _copy(state, _empty_rows)
    in_place = state is not None and all(x is y for x, y in zip(state, out_state, strict=True))
    new = _moments(c, out_state)
    old = (None,) * 5 if state is None or in_place else _moments(c, state)
    gain, ridge = c.gain, c.ridge
    value_gain, value_ridge = c.shaping(readings(c.op, c.order)[0].shaped_by)
    numbers = [
        *(0.0 if isinstance(x, Tensor) else x for x in (gain, ridge, value_gain, value_ridge)), c.scale, c.eps,
    ]  # fmt: skip
    slots = None if state_indices is None else state_indices.contiguous()
    launch: Callable = torch.ops.hla.step if torch.compiler.is_compiling() else _launch
    inputs = (*map(_last_contiguous, (c.q, c.k, c.v, c.p)), c.g, gain, ridge, value_gain, value_ridge, c.nodes)
    several = c.q.dim() == 4
    o = launch(
        *((x if several else x.unsqueeze(1)) if isinstance(x, Tensor) else None for x in inputs),
        slots, numbers, c.order if c.op == "hla_q" else 0, in_place, *old, *new,
    )  # fmt: skip
    return o if several else o.squeeze(1), out_state


def _launch(
    q, k, v, p, g, gain, ridge, value_gain, value_ridge, nodes, slots, numbers, order, in_place,
    S_old, P_old, F_old, m_old, n_old, S, P, F, m, n,
) -> Tensor:  # fmt: skip
    """One launch for inputs ``[B, T, H, ...]``. The last five are written; order is that of hla_q, or 0."""
    batch, T, hq, K = q.shape
    hkv, V = v.shape[2:]
    o = v.new_empty(batch, T, hq, V)
    if batch == 0:
        return o
    new = (S, P, F, m, n)
    old = new if in_place else (S_old, P_old, F_old, m_old, n_old)
    gain, ridge, value_gain, value_ridge = (
        number if x is None else x
        for number, x in zip(numbers[:4], (gain, ridge, value_gain, value_ridge), strict=True)
    )
    few = batch * hkv < FEW_PROGRAMS
    BK, BV = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(V))
    heads = triton.next_power_of_2(hq // hkv)
    readers = triton.next_power_of_2(T) * heads
    pdl = _overlapping.get() and in_place and slots is None
    sizes = dict(
        T=T, HKV=hkv, K=K, V=V, BK=BK, HEADS=heads, READERS=readers, PACKED=S is not None and S.dim() == 5, PDL=pdl
    )
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    if order:
        BI = BK if BK <= RESIDENT else 32
        held = (few or BK <= 64) and T == 1 and BI == BK and BV <= RESIDENT
        BC = BV if held else min(BV, 8192 // BK)
        warps = min(8, BK * max(BK, BV) // 1024) if held else min(16 if sizes["PACKED"] else 8, BI * BK // 1024)
        if warps == 8 and not (few or held or sizes["PACKED"]) and torch.version.hip is None:
            options["maxnreg"] = TWO_PROGRAMS
        with torch.cuda.device_of(q):
            query_side_kernel[batch * hkv,](
                q, k, v, g, ridge, nodes, slots, o, old[0], old[1], S, P,
                *_strides(q, k, v, g, ridge), *(nodes.stride() if _is(nodes) else (0,) * 4),
                *(_row_stride(x) for x in (old[0], old[1], S, P)), numbers[4],
                RIDGE=_is(ridge), ORDER=order, GQ=hq // hkv, BC=BC, HELD=held, BI=BI, **sizes,
                num_warps=max(1, warps), **options,
            )  # fmt: skip
        return o
    hp = F.shape[1]
    splits = 1
    if few and S is None and n is None and BV > 32:
        BV, splits = 32, triton.cdiv(V, 32)  # columns of values are independent; S and the sums m, n are needed by all
    # Many programs hide each other's latency with small blocks; a few ask for as much at once as their registers hold.
    width = BV if S is None else max(BK, BV)
    tile = 4096 if not few else 16384 if hp == hkv and width <= 128 else 8192
    BI = min(BK, max(4, tile // width))
    with torch.cuda.device_of(q):
        step_kernel[batch * hkv * splits,](
            q, k, v, p, g, gain, ridge, value_gain, value_ridge, slots, o, *old, *new,
            *_strides(q, k, v, p, g, gain, ridge, value_gain, value_ridge), *(_row_stride(x) for x in (*old, *new)),
            numbers[4], numbers[5],
            GAIN=_is(gain), RIDGE=_is(ridge), VALUE_GAIN=_is(value_gain), VALUE_RIDGE=_is(value_ridge),
            KEYS=S is not None, VALUES=P is not None, NORMALIZE=n is not None,
            GP=hp // hkv, GQ=hq // hp, BI=BI, BV=BV, SPLITS=splits, **sizes,
            num_warps=max(1, min(16, max(BI, readers) * width // 1024)), **options,
        )  # fmt: skip
    return o


# torch.compile sees the launch as one operator: what it writes is in the schema, what it returns in the fake.
_step_op = torch.library.custom_op(
    "hla::step",
    _launch,
    mutates_args=("S", "P", "F", "m", "n"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor p, Tensor? g, Tensor? gain, Tensor? ridge, Tensor? value_gain, "
        "Tensor? value_ridge, Tensor? nodes, Tensor? slots, float[] numbers, int order, bool in_place, "
        "Tensor? S_old, Tensor? P_old, Tensor? F_old, Tensor? m_old, Tensor? n_old, "
        "Tensor(a!)? S, Tensor(b!)? P, Tensor(c!)? F, Tensor(d!)? m, Tensor(e!)? n) -> Tensor"
    ),
)


@_step_op.register_fake
def _(q, k, v, *rest):
    return v.new_empty(*q.shape[:3], v.shape[3])


def _moments(call: Call, state: State) -> tuple[Tensor | None, ...]:
    """The tensors of a state by their part in the kernel, as views: S, P (read first), F (read last), m, n."""
    S, moments, ones = unpack(call.op, call.order, state)
    if call.op == "hla_q":
        return S, moments[0], None, None, None
    P, F = moments if len(moments) == 2 else (None, moments[0])
    m, n = (None, None) if ones is None else ones if len(ones) == 2 else (None, ones[0])
    return S, P, F, m, n


def _fresh(call: Call, batch: int) -> State:
    """Memory for the state of a call."""
    shapes = zeros(
        call.op, batch, call.q.shape[-2], call.k.shape[-2], call.q.shape[-1], call.v.shape[-1], order=call.order,
        p_heads=call.p.shape[-2], normalize=call.normalize, device="meta",
    )  # fmt: skip
    return _copy(shapes, lambda x: call.q.new_empty(x.shape, dtype=torch.float32))


def _empty_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _copy(state: State, function: Callable[[Tensor], Tensor]) -> State:
    cls: Any = type(state)
    return cls(*(None if x is None else function(x) for x in state))


def _is(x) -> bool:
    return isinstance(x, Tensor)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows_are_contiguous(x: Tensor) -> bool:
    """Whether what follows the leading dimension lies in one piece; rows may lie anywhere."""
    size = 1
    for n, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def _strides(*tensors) -> list[int]:
    """Strides of batch, token and head."""
    return [stride for x in tensors for stride in (x.stride()[:3] if _is(x) else (0, 0, 0))]


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
