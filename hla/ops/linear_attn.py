"""The primitive: causal linear attention ``LA(q, k, v; g)`` in chunk form, with its own gradient.

With ``c_t = g_1 + ... + g_t`` (log-decay, ``g <= 0``):

    inclusive  o_t = sum_{j<=t} exp(c_t - c_j)     (q_t . k_j) v_j
    strict     o_t = sum_{j<t}  exp(c_{t-1} - c_j) (q_t . k_j) v_j
    reversed   o_t = sum_{j>=t} exp(c_j - c_t)     (q_t . k_j) v_j

**Chunk form.** Inside a chunk of C tokens this is ``((Q K^T) * E) V``; what lies before the chunk arrives through the
state ``P = sum_j exp(...) k_j v_j^T``. All three kinds are one computation with different numbers: a *read* weight per
token (how much a state entering its chunk has decayed when the token reads it), a *write* weight (how much the token's
own ``k v^T`` has decayed when the chunk is left), and a direction. All exponents are <= 0, so nothing overflows.

**Gradient.** The adjoint of LA is LA (with read and write exchanged and the direction turned):
``dq = LA(do, v, k)``, ``dk = LA^r(v, do, q)``, ``dv = LA^r(k, q, do)``. One walk against the direction of the forward
pass computes all three; it recomputes the states of a block of chunks from the one state that entered the block.

**Chains.** Operators are short chains of such stages (`family`). `chain` takes a block of chunks through all stages
before it goes on to the next block, in the backward pass too, so that a block is loaded once and gradients of what
several stages read meet in cache. `la` is a chain of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hla.ops.grouped import add_, add_mm_, dot, mm, outer, scale_heads_, scaled, sum_heads, tmm
from hla.ops.layout import Packed, Uniform, wide

CHUNK = 64
# Chunks are worked on in blocks of about this many numbers per operand: on a CPU what one block needs stays in cache.
BLOCK_NUMBERS = 3 << 16
GPU_BLOCK_NUMBERS = 1 << 24

MODES = ("inclusive", "strict", "reversed")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if anything is float64, else float32: the dtype of states and accumulators."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def no_autocast(x: Tensor) -> torch.autocast:
    """Autocast must not turn the float32 sums of the operators into bfloat16 ones: they choose their own precision."""
    return torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False)


@dataclass(frozen=True)
class Stage:
    """``out = gain * LA(query, keys, values; gate * g) + sum of ridge * residual``; operands are names of tensors.

    ``gain`` and every ``ridge`` of the pairs ``residuals`` are numbers or names of per-token tensors
    ``[B, T, heads of query]``.
    """

    out: str
    query: str
    keys: str
    values: str
    gate: int = 1
    gain: float | str = 1.0
    residuals: tuple[tuple[float | str, str], ...] = ()
    mode: str = "inclusive"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")


def chain(
    stages: Sequence[Stage],
    tensors: dict[str, Tensor],
    per_token: dict[str, Tensor],
    g: Tensor | None,
    *,
    outputs: dict[str, torch.dtype],
    initial_states: Sequence[Tensor | None],
    cu_seqlens: Tensor | None = None,
    output_final_states: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs stages one after the other; a stage may read what earlier ones wrote.

    Args:
        stages: all of one direction (reversed, or not).
        tensors: named inputs ``[B, T, H, D]``. Head counts are independent as long as, of any two that meet, one
            divides the other; head h of the larger uses head ``h // group`` of the smaller, which is never repeated.
        per_token: named gains and ridges ``[B, T, H]``. g: ``[B, T, Hg]`` or None.
        outputs: names of the results wanted, with their dtypes.
        initial_states: per stage ``[B or N, Hs, K, V]`` with ``Hs = max(heads of keys, values, g)``, or None.
        cu_seqlens: ``[N + 1]``; B must be 1.

    Inputs may be any mix of float64, float32, bfloat16 and float16; all sums are in float32 (float64 if any input is).
    Arguments are trusted here: `hla.ops.checks` has the checks of the public functions.

    Returns:
        The outputs, and the final state of every stage (float32 / float64), or an empty list.
    """
    moments = _moments(stages, initial_states)
    # A state that several stages begin with is given once: torch.compile takes no tensor twice.
    starts = [x if first == i else None for i, (x, first) in enumerate(zip(initial_states, moments, strict=True))]
    flat = [*tensors.values(), *per_token.values(), *starts]
    plan = _Plan(
        stages=tuple(stages),
        moments=moments,
        tensors=tuple(tensors),
        per_token=tuple(per_token),
        outputs=tuple(outputs.items()),
        differentiable=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (g, *flat)),
    )
    with no_autocast(next(iter(tensors.values()))):
        results = _Chain.apply(plan, cu_seqlens, g, *flat)
    return list(results[: len(outputs)]), list(results[len(outputs) :]) if output_final_states else []


def la(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    gain: float | Tensor = 1.0,
    ridge: float | Tensor = 0.0,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    mode: str = "inclusive",
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    run: Callable[..., tuple[list[Tensor], list[Tensor]]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``o = gain * LA(q, k, v; g) + ridge * residual``: a `chain` of one stage.

    Args:
        q: ``[B, T, Hq, K]``; k: ``[B, T, Hk, K]``; v: ``[B, T, Hv, V]``; g: ``[B, T, Hg]`` log-decay or None.
        gain: float or ``[B, T, Hq]``. ridge: float or ``[B, T, Hq]``, with residual ``[B, T, Hr, V]``.
        initial_state: ``[B or N, Hs, K, V]`` with ``Hs = max(Hk, Hv, Hg)``.
        out_dtype: dtype of o; by default that of v.
        run: what computes the chain, by default `chain`.

    Returns:
        o ``[B, T, max of all head counts, V]`` and the final state (float32 / float64), or None.
    """
    tensors: dict[str, Tensor] = {}

    def name(x: Tensor) -> str:
        """One name per tensor: k as keys and values is loaded once, and has one gradient."""
        known = next((n for n, y in tensors.items() if y is x), None)
        tensors[known or f"x{len(tensors)}"] = x
        return known or f"x{len(tensors) - 1}"

    per_token = {n: x for n, x in (("gain", gain), ("ridge", ridge)) if isinstance(x, Tensor)}
    stage = Stage(
        out="o",
        query=name(q),
        keys=name(k),
        values=name(v),
        gain="gain" if isinstance(gain, Tensor) else gain,
        residuals=() if residual is None else (("ridge" if isinstance(ridge, Tensor) else ridge, name(residual)),),
        mode=mode,
    )
    (o,), finals = (run or chain)(
        [stage],
        tensors,
        per_token,
        g,
        outputs={"o": out_dtype or v.dtype},
        initial_states=[initial_state],
        cu_seqlens=cu_seqlens,
        output_final_states=output_final_state,
    )
    return o, finals[0] if output_final_state else None


def _moments(stages: Sequence[Stage], initial_states: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Per stage, the index of the first stage with the same keys, values, decay and initial state."""
    keys = [(s.keys, s.values, s.gate, s.mode, id(x)) for s, x in zip(stages, initial_states, strict=True)]
    return tuple(keys.index(key) for key in keys)


@dataclass(frozen=True)
class _Plan:
    """What a chain computes, without the tensors."""

    stages: tuple[Stage, ...]
    moments: tuple[int, ...]  # per stage, the first stage that accumulates the same state
    tensors: tuple[str, ...]
    per_token: tuple[str, ...]
    outputs: tuple[tuple[str, torch.dtype], ...]
    differentiable: bool

    def split(self, flat: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
        """(tensors, per-token tensors, initial states) of a flat list."""
        a, b = len(self.tensors), len(self.tensors) + len(self.per_token)
        return (
            dict(zip(self.tensors, flat[:a], strict=True)),
            dict(zip(self.per_token, flat[a:b], strict=True)),
            list(flat[b:]),
        )

    def reads(self, stage: int) -> set[str]:
        """Names of the tensors a stage reads."""
        s = self.stages[stage]
        names = {s.query, s.keys, s.values, s.gain, *(x for pair in s.residuals for x in pair)}
        return {name for name in names if isinstance(name, str)}

    @property
    def intermediates(self) -> list[str]:
        """What one stage writes for a later one: kept for the backward pass."""
        read = set().union(*(self.reads(i) for i in range(len(self.stages))))
        return [s.out for s in self.stages if s.out in read]

    @property
    def last_read(self) -> list[set[str]]:
        """Per stage, what no earlier stage reads: their gradients are complete when the backward pass leaves it."""
        sets = []
        earlier: set[str] = set()
        for i in range(len(self.stages)):
            sets.append(self.reads(i) - earlier)
            earlier |= sets[-1]
        return sets


@dataclass(frozen=True)
class _Heads:
    """Head counts and widths of one stage: query, keys, values, gate, state, output."""

    q: int
    k: int
    v: int
    g: int
    s: int
    o: int
    K: int
    V: int


class _Shape:
    """Sizes, layout and block boundaries of a call, the same for its forward and its backward pass."""

    def __init__(self, plan: _Plan, tensors: dict[str, Tensor], g: Tensor | None, cu_seqlens: Tensor | None):
        first = next(iter(tensors.values()))
        self.batch, self.length = first.shape[:2]
        self.dtype, self.device = compute_dtype(*tensors.values()), first.device
        sizes = {name: x.shape[2:] for name, x in tensors.items()}
        gate = 1 if g is None else g.shape[2]
        self.heads = []
        for s in plan.stages:
            (q, K), (k, _), (v, V) = sizes[s.query], sizes[s.keys], sizes[s.values]
            state = max(k, v, gate)
            self.heads.append(_Heads(q, k, v, gate, state, max(q, state), K, V))
            sizes[s.out] = torch.Size((max(q, state), V))
        self.sizes = sizes
        chunk = min(CHUNK, max(16, -(-self.length // 16) * 16))
        self.layout = (
            Uniform(self.batch, self.length, chunk) if cu_seqlens is None else Packed(cu_seqlens, self.length, chunk)
        )
        numbers = GPU_BLOCK_NUMBERS if self.device.type == "cuda" else BLOCK_NUMBERS
        widest = max(h.o * max(h.K, h.V) for h in self.heads)
        step = max(1, numbers // max(1, self.batch * chunk * widest))
        n = self.layout.num_chunks
        self.reverse = plan.stages[0].mode == "reversed"
        # First and last chunk of each block, in the direction of the forward pass.
        self.blocks = [(a, min(a + step, n)) for a in range(0, n, step)]
        if self.reverse:
            self.blocks.reverse()

    def state(self, stage: int, given: Tensor | None) -> Tensor:
        """A state as given, or zeros."""
        if given is not None:
            return given.to(self.dtype)
        h = self.heads[stage]
        return torch.zeros(self.layout.sequences, h.s, h.K, h.V, dtype=self.dtype, device=self.device)

    def new(self, name_or_heads: str | int, dtype: torch.dtype) -> Tensor:
        """Memory for a named tensor ``[B, T, H, D]``, or for one number per token ``[B, T, H, 1]``."""
        size = (name_or_heads, 1) if isinstance(name_or_heads, int) else self.sizes[name_or_heads]
        return self.layout.new_output((self.batch, self.length, *size), self.device, dtype)


class _Moment(NamedTuple):
    """The walk over the states of a stage; ``shared`` with other stages, of which ``first`` is the first."""

    first: int
    walk: Any
    shared: bool


def _walked(plan: _Plan, shape: _Shape, initial: Sequence[Tensor | None], backward: bool = False) -> list[_Moment]:
    """Per stage its walk in the direction of the forward pass, or of the backward pass."""
    reverse = shape.reverse != backward
    walks = {i: shape.layout.walk(shape.state(i, initial[i]), reverse) for i in dict.fromkeys(plan.moments)}
    return [_Moment(i, walks[i], plan.moments.count(i) > 1) for i in plan.moments]


def _sum_shared(plan: _Plan, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Per stage the gradient of its final state; of a shared moment the sum, for its first stage alone."""
    sums: list[Tensor | None] = [None] * len(gradients)
    for first, x in zip(plan.moments, gradients, strict=True):
        if x is not None:
            known = sums[first]
            sums[first] = x if known is None else known + x
    return sums


class _Block:
    """One block of chunks at work: named operands ``[B, M, H, C, D]``, per-token numbers ``[B, M, H, C, 1]``."""

    def __init__(self, shape: _Shape, first: int, last: int, g: Tensor | None, named: dict[str, Tensor]):
        self.shape, self.first, self.last = shape, first, last
        self.named = named  # whole tensors, of which a block is loaded when first read
        self.loaded: dict[str, Tensor] = {}
        # Decays are cumulated in float64; below -1000 they are 0 all the same, and would only cost digits.
        self.g = None
        if g is not None:
            self.g = shape.layout.load(g[..., None], first, last, wide(shape.device)).clamp(min=-1000.0)
        self._decays: dict[tuple[int, str], _Decays] = {}
        self._states: dict[int, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.loaded:
            y = self.named[name]
            self.loaded[name] = self.load(y if y.dim() == 4 else y[..., None])
        return self.loaded[name]

    def load(self, y: Tensor) -> Tensor:
        return self.shape.layout.load(y, self.first, self.last, self.shape.dtype)

    def store(self, out: Tensor, y: Tensor) -> None:
        self.shape.layout.store(out, y, self.first, self.last)

    def decays(self, stage: Stage) -> _Decays:
        key = (stage.gate, stage.mode)
        if key not in self._decays:
            g = None if self.g is None else stage.gate * self.g
            self._decays[key] = _Decays(stage.mode, g, self.shape.dtype)
        return self._decays[key]

    def number(self, value: float | str) -> float | Tensor:
        return self[value] if isinstance(value, str) else value

    def query(self, stage: Stage) -> tuple[Tensor, float]:
        """Query and factor of its products: ``gain_t o_t`` is what ``gain_t q_t`` reads; a constant gain is free."""
        if isinstance(stage.gain, str):
            return scaled(self[stage.query], self[stage.gain]), 1.0
        return self[stage.query], stage.gain

    def states(self, stage: Stage, heads: _Heads, moment: _Moment) -> Tensor:
        """The states that enter the chunks of this block; computed once for all stages that share the moment."""
        if moment.first in self._states:
            return self._states[moment.first]
        w = self.decays(stage)
        written = outer(scaled(self[stage.keys], w.write), self[stage.values], heads.s)
        states = moment.walk.block(written, w.log_rho(heads), self.first, self.last)
        if moment.shared:
            self._states[moment.first] = states
        return states

    def forward(self, stage: Stage, heads: _Heads, moment: _Moment) -> None:
        w, (q, gain) = self.decays(stage), self.query(stage)
        y = mm(w.mask_(mm(q, self[stage.keys].mT, gain)), self[stage.values])
        y = add_mm_(y, scaled(q, w.read), self.states(stage, heads, moment), gain)
        for ridge, residual in stage.residuals:
            y = add_(y, scaled(self[residual], self.number(ridge)))
        self.loaded[stage.out] = y


class _Decays:
    """Decays of a block: ``read``, ``write [B, M, Hg, C, 1]``, ``E [B, M, Hg, C, C]``; None without a gate."""

    def __init__(self, mode: str, g: Tensor | None, dtype: torch.dtype):
        self.mode, self.read, self.write, self.total, self.E = mode, None, None, None, None
        if g is None:
            return
        c = g.cumsum(3)
        self.total = c[..., -1:, :]
        if mode == "reversed":
            read, write = -c, -c  # exponents relative to the chunk's left edge
            self.read, self.write = (self.total - c).to(dtype).exp(), c.to(dtype).exp()
        else:
            read, write = (c - g if mode == "strict" else c), c
            self.read, self.write = read.to(dtype).exp(), (self.total - c).to(dtype).exp()
        exponent = (read - write.mT).to(dtype)
        self.E = exponent.masked_fill_(self._outside(exponent), float("-inf")).exp_()

    def _outside(self, like: Tensor) -> Tensor:
        ones = torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device)
        if self.mode == "reversed":
            return ones.tril(-1)
        return ones.triu(0 if self.mode == "strict" else 1)

    def log_rho(self, heads: _Heads) -> Tensor | None:
        """Log-decay over each whole chunk, per head of the state: ``[B, M, Hs]``."""
        return None if self.total is None else self.total[..., 0, 0].repeat_interleave(heads.s // heads.g, dim=2)

    def mask_(self, scores: Tensor) -> Tensor:
        """``scores * E`` (the decayed causal mask), in place where the head counts allow it."""
        if self.E is not None:
            return scale_heads_(scores, self.E)
        if self.mode == "reversed":
            return scores.triu_()
        return scores.tril_(-1 if self.mode == "strict" else 0)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, cu_seqlens, g, *flat):
        tensors, per_token, initial = plan.split(flat)
        shape = _Shape(plan, tensors, g, cu_seqlens)
        outputs = {name: shape.new(name, dtype) for name, dtype in plan.outputs}
        kept = {name: shape.new(name, shape.dtype) for name in plan.intermediates if plan.differentiable}
        moments = _walked(plan, shape, initial)
        walks = {m.first: m.walk for m in moments}
        entries = []  # the states entering each block, for the backward pass
        for first, last in shape.blocks:
            block = _Block(shape, first, last, g, tensors | per_token)
            if plan.differentiable:
                entries += [walk.carry for walk in walks.values()]
            for stage, heads, moment in zip(plan.stages, shape.heads, moments, strict=True):
                block.forward(stage, heads, moment)
            for name, out in (*outputs.items(), *kept.items()):
                block.store(out, block[name])
        finish = shape.layout.finish_output
        finals = [moment.walk.final.clone() for moment in moments]
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cu_seqlens, g, *flat, *map(finish, kept.values()), *finals, *entries)
        return *map(finish, outputs.values()), *finals

    @staticmethod
    def backward(ctx, *grad_outputs):
        if torch.is_grad_enabled():  # create_graph=True; the terms it would miss must not be missed silently
            raise RuntimeError("double backward through HLA operators (create_graph=True) is not supported")
        if all(x is None for x in grad_outputs):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # to be unpacked once only, for the sake of gradient checkpointing
        with no_autocast(saved[2]):
            return None, None, *_backward(ctx.plan, saved, grad_outputs, ctx.needs_input_grad[2:])


def _backward(plan: _Plan, saved, grad_outputs, needed) -> list[Tensor | None]:
    """Gradients of ``(g, *flat)``: one walk over the blocks against the forward direction, stages last to first."""
    cu_seqlens, g, *rest = saved
    cut = len(plan.tensors) + len(plan.per_token) + len(plan.stages)
    flat, rest = rest[:cut], rest[cut:]
    count, n = len(plan.intermediates), len(plan.stages)
    kept, finals, entries = (
        dict(zip(plan.intermediates, rest, strict=False)),
        rest[count : count + n],
        rest[count + n :],
    )
    tensors, per_token, initial = plan.split(flat)
    shape = _Shape(plan, tensors, g, cu_seqlens)
    layout, dtype = shape.layout, shape.dtype
    douts = {name: x for (name, _), x in zip(plan.outputs, grad_outputs, strict=False) if x is not None}
    dfinals = grad_outputs[len(plan.outputs) :]

    need_tensors, need_per_token, need_initial = plan.split(needed[1:])
    last_read = plan.last_read
    read = set().union(*last_read)
    grads = {x: shape.new(x, tensors[x].dtype) for x, need in need_tensors.items() if need and x in read}
    grads |= {x: shape.new(per_token[x].shape[2], dtype) for x, need in need_per_token.items() if need and x in read}
    gated = g is not None and needed[0]
    dc = shape.new(g.shape[2], dtype) if gated else None  # of the cumulated decays
    dread = shape.new(g.shape[2], dtype) if gated and any(s.mode == "strict" for s in plan.stages) else None
    moments = _walked(plan, shape, initial)
    walks = {m.first: m.walk for m in moments}
    adjoints = _walked(plan, shape, _sum_shared(plan, dfinals), backward=True)

    for index in range(len(shape.blocks) - 1, -1, -1):
        block = _Block(shape, *shape.blocks[index], g, tensors | per_token | kept)
        sums = _BlockGradients({name: block.load(x) for name, x in douts.items()}, gated)
        for walk, entry in zip(walks.values(), entries[index * len(walks) :], strict=False):
            walk.carry = entry
        for i in range(n - 1, -1, -1):
            sums.backward(block, i, plan.stages[i], shape.heads[i], moments[i], adjoints[i])
            for name in last_read[i]:
                if name in grads:
                    block.store(grads[name], sums.x.pop(name))
                del block.loaded[name]
        if dc is not None:
            block.store(dc, sums.c)
        if dread is not None:
            block.store(dread, sums.read)

    results = {name: layout.finish_output(x) for name, x in grads.items()}
    dg = None
    if g is not None and dc is not None:
        dg = layout.reverse_cumsum(
            layout.finish_output(dc)[..., 0], _at_ends(plan, shape, initial, finals, dfinals, adjoints)
        )
        if dread is not None:
            dg = dg - layout.finish_output(dread)[..., 0]
        dg = dg.to(g.dtype)
    return [
        dg,
        *(results.get(name) for name in plan.tensors),
        *(results[name][..., 0].to(x.dtype) if name in results else None for name, x in per_token.items()),
        *(
            adjoint.walk.final.to(x.dtype) if need and adjoint.first == i else None
            for i, (adjoint, x, need) in enumerate(zip(adjoints, initial, need_initial, strict=True))
        ),
    ]


def _at_ends(plan: _Plan, shape: _Shape, initial, finals, dfinals, adjoints) -> Tensor | None:
    """c at the right-hand end also scales the state there: the final one, or the initial one if reversed."""
    total = None
    for i, (stage, heads) in enumerate(zip(plan.stages, shape.heads, strict=True)):
        if shape.reverse:  # (of a shared moment, counted once)
            state, dstate = (initial[i], adjoints[i].walk.final) if adjoints[i].first == i else (None, None)
        else:
            state, dstate = finals[i], dfinals[i]
        if state is not None and dstate is not None:
            x = stage.gate * (state * dstate).sum((-1, -2)).unflatten(1, (heads.g, heads.s // heads.g)).sum(-1)
            total = x if total is None else total + x
    return total


class _BlockGradients:
    """Gradients within one block, by name; every tensor here is fresh and may be added to in place."""

    def __init__(self, douts: dict[str, Tensor], gated: bool):
        self.x, self.gated = douts, gated
        self.c: Any = 0.0
        self.read: Any = 0.0
        self.shared: dict[int, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        self.x[name] = self.x[name].add_(x) if name in self.x else x

    def backward(
        self, block: _Block, index: int, stage: Stage, heads: _Heads, moment: _Moment, adjoint: _Moment
    ) -> None:
        """Adds the gradients of what the stage read. Intermediate results are deleted as soon as they were used.

        What stages with a shared moment put into its adjoint is added up and read once, at the first of them.
        """
        if stage.out in self.x:
            dy = self.x.pop(stage.out)
        else:
            values = block[stage.values]
            dy = values.new_zeros(*values.shape[:2], heads.o, *values.shape[3:])
        w, k, v = block.decays(stage), block[stage.keys], block[stage.values]
        q, gain = block.query(stage)
        heads_q, heads_k = max(heads.q, heads.g), max(heads.k, heads.g)

        states = block.states(stage, heads, moment)
        dscores = w.mask_(mm(dy, v.mT))
        dq = sum_heads(add_mm_(mm(dscores, k, gain), scaled(dy, w.read), states.mT, gain), heads_q)
        del states
        dk = tmm(dscores, q, heads_k, gain)
        del dscores
        dv = tmm(w.mask_(mm(q, k.mT, gain)), dy, heads.v)
        read = outer(scaled(q, w.read), dy, heads.s, gain)
        twin = k is v and heads_k == heads.k  # keys that are their own values: both roles have one gradient
        if twin:
            dk = add_(dk, dv)
        if moment.first in self.shared:
            read = read.add_(self.shared.pop(moment.first))
        if moment.shared and index != moment.first:
            self.shared[moment.first] = read
        else:
            entering = adjoint.walk.block(read, w.log_rho(heads), block.first, block.last)
            written = scaled(k, w.write)
            if twin:
                dk = _add_reading(dk, written, entering + entering.mT, heads_k)
            else:
                dk = _add_reading(dk, scaled(v, w.write), entering.mT, heads_k)
                dv = _add_reading(dv, written, entering, heads.v)
            del entering, written
        del read
        if not twin:
            self.add(stage.values, dv)
        del dv

        if self.gated:
            # Of a twin, k . dk is the same in both roles.
            from_q, from_k = sum_heads(dot(q, dq), heads.g), sum_heads(dot(k, dk), heads.g)
            from_k = 0.5 * from_k if twin else from_k
            self.c = self.c + stage.gate * (from_k - from_q if stage.mode == "reversed" else from_q - from_k)
            if stage.mode == "strict":
                self.read = self.read + stage.gate * from_q
        self.add(stage.keys, sum_heads(dk, heads.k))
        dq = sum_heads(dq, heads.q)
        if isinstance(stage.gain, str):
            self.add(stage.gain, dot(block[stage.query], dq))
            dq = scaled(dq, block[stage.gain])
        self.add(stage.query, dq)
        for ridge, residual in stage.residuals:
            if isinstance(ridge, str):
                self.add(ridge, sum_heads(dot(dy, block[residual]), block[ridge].shape[2]))
            self.add(residual, sum_heads(scaled(dy, block.number(ridge)), block[residual].shape[2]))


def _add_reading(y: Tensor, x: Tensor, state: Tensor, heads: int) -> Tensor:
    """``y + x @ state`` summed over groups down to ``heads``, the heads of y."""
    if heads >= max(x.shape[2], state.shape[2]):
        return add_mm_(y, x, state)
    return add_(y, sum_heads(mm(x, state), heads))
