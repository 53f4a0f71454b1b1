"""Chains of the primitive on a GPU: stage after stage, forward and backward, as one `torch.library` operator each.

The same contract as `hla.ops.linear_attn.chain`, with other means: every stage is one launch of `linear_attn.walk` (two
more where the sequence is split), every gradient of a stage is one more launch of the same kernel (of keys and values
together where a program has the whole state), and gradients of what several stages read are added up in the kernel that
comes later. Gated stages have theirs from the states between chunks (`pairs`), where these fit. Between two stages
transformed keys and values pass through memory in bfloat16 (float32 for float32 inputs); they are what the backward
pass needs of the forward one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from hla.kernels import pairs
from hla.kernels.configs import device_config, query_side_config
from hla.kernels.fused import fits, fused, matches
from hla.kernels.library import Operation
from hla.kernels.linear_attn import Read, both_at_once, operand, per_head, read, row_dot, shared, sum_heads
from hla.kernels.segments import Cut, cut, cut_every, minus_earlier, sum_later
from hla.ops.linear_attn import Stage

DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Plan:
    """What a chain computes, without the tensors. As a string (`encode`) it is an argument of the operators."""

    stages: tuple[Stage, ...]
    tensors: tuple[str, ...]
    per_token: tuple[str, ...]
    initial: tuple[bool, ...]  # which stages have an initial state
    outputs: tuple[tuple[str, str], ...]  # names and dtypes
    finals: bool

    @functools.cached_property
    def kept(self) -> tuple[str, ...]:
        """What one stage writes for a later one."""
        return tuple(s.out for s in self.stages if any(s.out in _reads(t) for t in self.stages))

    def unflatten(self, flat: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """(tensors and per-token numbers by name, initial states) of a flat list."""
        names = self.tensors + self.per_token
        states = iter(flat[len(names) :])
        return dict(zip(names, flat, strict=False)), [next(states) if given else None for given in self.initial]


def encode(plan: Plan) -> str:
    """(In plain operations on strings, which torch.compile traces.)"""
    stages = [
        "|".join(
            [s.out, s.query, s.keys, s.values, str(s.gate), _word(s.gain), s.mode]
            + [part for number, name in s.residuals for part in (_word(number), name)]
        )
        for s in plan.stages
    ]
    fields = [
        ";".join(stages), "|".join(plan.tensors), "|".join(plan.per_token),
        "|".join([str(int(x)) for x in plan.initial]), "|".join([part for pair in plan.outputs for part in pair]),
        str(int(plan.finals)),
    ]  # fmt: skip
    return "&".join(fields)  # (no line break: the compiler writes this into Python code)


@functools.cache
def decode(text: str) -> Plan:
    stages, tensors, per_token, initial, outputs, finals = text.split("&")
    read = []
    for line in stages.split(";"):
        out, query, keys, values, gate, gain, mode, *rest = line.split("|")
        residuals = tuple((_unword(x), name) for x, name in zip(rest[::2], rest[1::2], strict=True))
        read.append(Stage(out, query, keys, values, int(gate), _unword(gain), residuals, mode))
    names = _split(outputs)
    return Plan(
        tuple(read), _split(tensors), _split(per_token), tuple(x == "1" for x in _split(initial)),
        tuple(zip(names[::2], names[1::2], strict=True)), finals == "1",
    )  # fmt: skip


def _word(x: float | str) -> str:
    """A number, or a name with a mark before it."""
    return "$" + x if isinstance(x, str) else repr(x)


def _unword(x: str) -> float | str:
    return x[1:] if x.startswith("$") else float(x)


def _split(x: str) -> tuple[str, ...]:
    return tuple(x.split("|")) if x else ()


def _reads(stage: Stage) -> set[str]:
    return {stage.query, stage.keys, stage.values, *(name for _, name in stage.residuals)}


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
    """As `hla.ops.linear_attn.chain`; without ``output_final_states`` the second list is empty."""
    plan, flat = prepared(stages, tensors, per_token, g, outputs, initial_states, output_final_states)
    n = len(outputs)
    results = _operation(encode(plan), n + (len(stages) if output_final_states else 0), flat[0], cu_seqlens, *flat[1:])
    return results[:n], results[n:]


def prepared(
    stages: Sequence[Stage], tensors: dict[str, Tensor], per_token: dict[str, Tensor], g: Tensor | None,
    outputs: dict[str, torch.dtype], initial_states: Sequence[Tensor | None], output_final_states: bool,
) -> tuple[Plan, list[Tensor | None]]:  # fmt: skip
    """The plan of a chain, and (g, tensors, per-token numbers, initial states) as the kernels take them."""
    plan = Plan(
        tuple(stages), tuple(tensors), tuple(per_token), tuple(x is not None for x in initial_states),
        tuple((name, str(dtype).removeprefix("torch.")) for name, dtype in outputs.items()), output_final_states,
    )  # fmt: skip
    return plan, [
        None if g is None else g.float().contiguous(),
        *(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors.values()),
        *(x.float().contiguous() for x in per_token.values()),
        *(x for x in initial_states if x is not None),
    ]


class Sizes:
    """Heads of what a stage reads and writes, and widths, by name; the dtype of what passes between stages."""

    def __init__(self, plan: Plan, x: dict[str, Tensor], g: Tensor | None):
        first = x[plan.tensors[0]]
        self.batch, self.length = first.shape[:2]
        self.device = first.device
        self.passed = torch.float32 if all(x[n].dtype == torch.float32 for n in plan.tensors) else torch.bfloat16
        self.gate = 1 if g is None else g.shape[2]
        self.of = {name: (x[name].shape[2], x[name].shape[3]) for name in plan.tensors}
        self.states: list[tuple[int, int, int]] = []
        for s in plan.stages:
            state = max(self.of[s.keys][0], self.of[s.values][0], self.gate)
            self.states.append((state, self.of[s.keys][1], self.of[s.values][1]))
            self.of[s.out] = (max(self.of[s.query][0], state), self.of[s.values][1])

    def cut(self, cu_seqlens: Tensor | None) -> Cut:
        programs = max(heads * -(-width // 64) for heads, width in self.of.values())
        return cut(self.batch, self.length, programs, cu_seqlens, self.device)


def _forward(
    plan: str, g: Tensor | None, cu_seqlens: Tensor | None, *flat: Tensor, keep: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, and final states if wanted; what stages pass on)."""
    p = decode(plan)
    x, initial = p.unflatten(flat)
    sizes = Sizes(p, x, g)
    shape = sizes.cut(cu_seqlens)
    pattern = matches(p)
    if pattern is not None and fits(pattern, x, g, shape):
        together = fused(
            pattern, x, g, shape, initial=initial, final=p.finals, keep=keep, out_dtype=DTYPES[p.outputs[0][1]],
            kept_dtype=sizes.passed,
        )  # fmt: skip
        return [together.o, *together.finals], together.kept
    dtypes = dict(p.outputs)
    finals: list[Tensor] = []
    for s, state in zip(p.stages, initial, strict=True):
        final = run_stage(p, s, x, g, sizes, shape, initial=state, final=p.finals)
        finals += [] if final is None else [final]
    return [*(x[name] for name in dtypes), *finals], kept_of(p, x)


def run_stage(
    p: Plan, s: Stage, x: dict[str, Tensor], g: Tensor | None, sizes: Sizes, shape: Cut, *, initial: Tensor | None,
    final: bool, entered: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Adds what a stage writes to x; returns the final state, if wanted. entered: see `read`."""
    dtypes = dict(p.outputs)
    (ridge, residual), *more = s.residuals or ((0.0, None),)
    done = read(
        x[s.query], x[s.keys], x[s.values], g, shape, heads=sizes.of[s.out][0], gate=s.gate,
        reverse=s.mode == "reversed", strict=s.mode == "strict", factor=number(s.gain, x), ridge=number(ridge, x),
        residual=None if residual is None else x[residual], initial=initial, entered=entered, final=final,
        out_dtype=DTYPES[dtypes[s.out]] if s.out in dtypes else sizes.passed,
    )  # fmt: skip
    for ridge, residual in more:
        done.o.add_(_times(number(ridge, x), x[residual]))
    x[s.out] = done.o
    return done.final


def kept_of(p: Plan, x: dict[str, Tensor]) -> list[Tensor]:
    """What the backward pass needs of the forward one; results of the chain as copies."""
    results = {name for name, _ in p.outputs}
    return [x[name].clone() if name in results else x[name] for name in p.kept]


def _fake(plan: str, g: Tensor | None, cu_seqlens: Tensor | None, *flat: Tensor) -> tuple[list, list]:
    p = decode(plan)
    x, _ = p.unflatten(flat)
    sizes = Sizes(p, x, g)
    new = flat[0].new_empty
    sequences = sizes.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    of = lambda name, dtype: new(sizes.batch, sizes.length, *sizes.of[name], dtype=dtype)  # noqa: E731
    finals = [new(sequences, *size, dtype=torch.float32) for size in sizes.states] if p.finals else []
    return [*(of(name, DTYPES[dtype]) for name, dtype in p.outputs), *finals], [of(n, sizes.passed) for n in p.kept]


def number(value: float | str, x: dict[str, Tensor]) -> float | Tensor:
    return x[value] if isinstance(value, str) else value


def _times(number: float | Tensor, y: Tensor) -> Tensor:
    """Per-token numbers ``[B, T, H]`` times ``[B, T, h, D]``, heads of the one dividing those of the other."""
    if not isinstance(number, Tensor):
        return number * y
    if number.shape[2] > y.shape[2]:
        y = y.repeat_interleave(number.shape[2] // y.shape[2], 2)
    elif number.shape[2] < y.shape[2]:
        number = number.repeat_interleave(y.shape[2] // number.shape[2], 2)
    return number[..., None] * y


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    g, cu_seqlens, *flat = tensors
    p = decode(plan)
    x, initial = p.unflatten(flat)
    x |= dict(zip(p.kept, saved, strict=True))
    need_g, _, *needed = needed
    n = len(p.outputs)
    dfinals = list(grads[n : n + len(p.stages)]) if p.finals else [None] * len(p.stages)
    dg, results, dinitial = gradients_of(
        p, x, g, initial, grads[:n], [need_g, *needed], cu_seqlens, lambda back, i: (dfinals[i], None)
    )
    given_states = [i for i, is_given in enumerate(p.initial) if is_given]
    for i, need in zip(given_states, needed[len(p.tensors) + len(p.per_token) :], strict=False):
        results.append(dinitial[i] if need else None)
    return [dg, None, *results]


def gradients_of(
    p: Plan,
    x: dict[str, Tensor],
    g: Tensor | None,
    initial: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    cu_seqlens: Tensor | None,
    behind: Callable[[Backward, int], tuple[Tensor | None, Tensor | None]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor]]:
    """The gradients of g, of tensors and per-token numbers, and of what enters each stage (empty where None does).

    Args:
        x: by name, what stages passed on included. initial: what enters each stage.
        needed: whether those of g, tensors and numbers are.
        behind: of a stage, when its turn comes: the gradient of the state behind it, and what enters the segments of a
            split from behind, if that is known (`Backward.stage`).
    """
    sizes = Sizes(p, x, g)
    back = Backward(x, needed[0], g, sizes, cu_seqlens)
    for (name, _), dy in zip(p.outputs, grads, strict=True):
        if dy is not None:
            back.d[name] = dy.clone() if name in p.kept else dy.contiguous()  # (more may be added to the former)
    dinitial: dict[int, Tensor] = {}
    for i in range(len(p.stages) - 1, -1, -1):
        dinitial[i] = back.stage(p.stages[i], sizes.states[i], initial[i], *behind(back, i))
    entering = [dinitial[i] for i in range(len(p.stages))]
    results: list[Tensor | None] = []
    for name, need in zip(p.tensors + p.per_token, needed[1:], strict=False):
        dx = back.d.get(name) if need else None
        results.append(torch.zeros_like(x[name]) if need and dx is None else dx)
    dg = _gate_gradient(p, sizes, back, initial, entering, cu_seqlens) if needed[0] else None
    return dg, results, entering


def _results(plan: str) -> int:
    p = decode(plan)
    return len(p.outputs) + (len(p.stages) if p.finals else 0)


_operation = Operation("chain", _forward, _fake, _backward, first_saved=_results)


class Backward:
    """Gradients by name, added up as stages are left."""

    def __init__(self, x: dict[str, Tensor], gated: bool, g: Tensor | None, sizes: Sizes, cu_seqlens: Tensor | None):
        self.x, self.g, self.sizes, self.shape = x, g, sizes, sizes.cut(cu_seqlens)
        self.chunks = functools.cache(
            lambda chunk: cut_every(chunk, sizes.batch, sizes.length, cu_seqlens, sizes.device)
        )
        self.d: dict[str, Tensor] = {}
        self.gated = gated
        # of the cumulated decays c_t, and, of strict stages, of the g_t that a reading at t leaves out
        self.dc: Tensor | float = 0.0
        self.dread: Tensor | float = 0.0
        self.dg: Tensor | float = 0.0  # of stages in pairs, itself

    def add(self, name: str, y: Tensor) -> None:
        """Adds a fresh tensor to a gradient."""
        y = sum_heads(y, self.x[name].shape[2])
        self.d[name] = self.d[name].add_(y) if name in self.d else y.to(self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.x[name].dtype

    def reading(self, name: str, q: Tensor, k: Tensor, v: Tensor, **options) -> Read:
        """One `read` whose output is (added to) the gradient of a tensor."""
        heads = options["heads"]
        known = self.d.get(name) if self.x[name].shape[2] == heads else None
        done = read(q, k, v, self.g, self.shape, out=known, out_dtype=self.dtype(name), **options)
        if known is None:
            self.add(name, done.o)
        return done

    def both(self, s: Stage, k: Tensor, q: Tensor, dy: Tensor, v: Tensor, **options) -> Read:
        """The gradients of values and keys in one walk."""
        heads, twin = options["heads"], s.keys == s.values
        out, other = (self.d.get(n) if self.x[n].shape[2] == heads else None for n in (s.values, s.keys))
        done = read(
            k, q, dy, self.g, self.shape, out=out, out_dtype=self.dtype(s.values), u=v,
            other=False if twin else True if other is None else other, other_dtype=self.dtype(s.keys), **options,
        )  # fmt: skip
        if out is None:
            self.add(s.values, done.o)
        if other is None and done.other is not None:
            self.add(s.keys, done.other)
        return done

    def gradient_of(self, s: Stage) -> Tensor:
        """Of what a stage wrote, zeros if nobody read it."""
        if s.out not in self.d:
            v = self.x[s.values]
            self.d[s.out] = v.new_zeros(*v.shape[:2], self.sizes.of[s.out][0], v.shape[3])
        return self.d[s.out]

    def writing(self, s: Stage) -> tuple[Tensor | None, float]:
        """Per-token weights and a factor of what the adjoint of a stage accumulates: its gain."""
        gain, q = number(s.gain, self.x), self.x[s.query]
        if isinstance(gain, Tensor):
            return gain, 1.0
        if gain == 0.0:
            return q.new_zeros(*q.shape[:2], 1, dtype=torch.float32), 1.0
        return None, float(gain)

    def stage(
        self, s: Stage, state: tuple[int, int, int], initial: Tensor | None, dfinal: Tensor | None,
        later: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Adds the gradients of what a stage read; returns that of its initial state.

        later: what enters the segments of a split from behind, in units of the factor of `writing`.
        """
        dy = self.gradient_of(s)
        del self.d[s.out]
        q, k, v = self.x[s.query], self.x[s.keys], self.x[s.values]
        heads, hs = self.sizes.of[s.out][0], state[0]
        if self.goes_in_pairs(s, heads):
            return self.in_pairs(s, state, dy, initial, dfinal, later)
        gain, (write, factor) = number(s.gain, self.x), self.writing(s)
        reverse, strict = s.mode == "reversed", s.mode == "strict"
        common = dict(heads=heads, gate=s.gate, strict=strict, exact=self.gated)

        # The gradient of the final state knows nothing of the factor that the adjoints get in the end; and where heads
        # share a state, each has its own adjoint, and it enters once.
        ends = ends_of(dfinal, factor, heads // hs)
        adjoint = dict(common, reverse=not reverse, write=write, factor=factor)
        wants_state = initial is not None
        twin = s.keys == s.values
        if not self.gated and both_at_once(k, q, dy, self.g):
            values = keys = self.both(s, k, q, dy, v, initial=ends, entered=later, final=wants_state, **adjoint)
        else:
            values = self.reading(
                s.values, k, q, dy, x=k if self.gated and twin else None, initial=ends, entered=later,
                final=wants_state, **adjoint,
            )  # fmt: skip
            keys = self.reading(
                s.keys, v, dy, q, x=k if self.gated and not twin else None, initial=None if ends is None else ends.mT,
                entered=None if values.entered is None else values.entered.mT, **adjoint,
            )  # fmt: skip

        fused = [r for r in s.residuals if r[1] == s.query and q.shape[2] == heads and dy.shape[-1] == q.shape[-1]][:1]
        ridge = number(fused[0][0], self.x) if fused else 0.0
        wants_dot = self.gated or isinstance(gain, Tensor)
        queries = self.reading(
            s.query, dy, v, k, reverse=reverse, factor=gain, x=q if wants_dot else None,
            own=self.gated and isinstance(gain, Tensor), ridge=ridge, residual=dy if fused else None,
            initial=None if initial is None else initial.mT, **common,
        )  # fmt: skip

        if wants_dot:
            assert queries.dot is not None
            if isinstance(s.gain, str):
                self.add_number(s.gain, queries.dot if queries.own is None else queries.dot + queries.own)
        if self.gated:
            key_dot = values.dot if twin else keys.dot
            assert key_dot is not None and queries.dot is not None
            from_q = sum_heads(_scaled(queries.dot, gain), self.sizes.gate)
            from_k = sum_heads(key_dot * factor, self.sizes.gate)
            self.dc = self.dc + s.gate * (from_k - from_q if reverse else from_q - from_k)
            if strict:
                self.dread = self.dread + s.gate * from_q
        self.residuals(s, dy, fused)
        return _of_initial(initial, values.final, factor, hs, dy)

    def residuals(self, s: Stage, dy: Tensor, done: Sequence[tuple[float | str, str]]) -> None:
        """Adds the gradients of what a stage adds to its output, but for those that are done."""
        for value, name in s.residuals:
            if isinstance(value, str):
                self.add_number(value, row_dot(dy, self.x[name]))
            if (value, name) not in done:
                self.add(name, _times(number(value, self.x), dy))

    def goes_in_pairs(self, s: Stage, heads: int) -> bool:
        """Whether chunks do from the states at their borders what would take three walks with EXACT (see `pairs`)."""
        (of_query, K), V = self.sizes.of[s.query], self.sizes.of[s.values][1]
        simple = s.mode == "inclusive" and not isinstance(s.gain, str) and s.gain != 0.0
        fits = all(pairs.fits(K, V, self.x[name].dtype) for name in (s.query, s.keys, s.values))
        return self.gated and simple and of_query == heads and fits

    def in_pairs(
        self, s: Stage, state: tuple[int, int, int], dy: Tensor, initial: Tensor | None, dfinal: Tensor | None,
        later: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `stage`, with the gradient of the decays itself instead of what it is a sum of."""
        q, k, v, factor, (hs, K, _) = self.x[s.query], self.x[s.keys], self.x[s.values], float(s.gain), state
        assert self.g is not None
        g = self.g if s.gate == 1 else s.gate * self.g
        heads, wide = q.shape[2], operand(q, k, v)[0] != tl.bfloat16
        config = query_side_config(K, wide, device_config(q.device)[0])
        found = pairs.gradients(
            q, k, v, dy, g, self.shape, self.chunks(config.chunk), config, factor=factor, initial=initial,
            ends=ends_of(dfinal, factor, heads // hs), later=later, dx_dtype=self.dtype(s.query), gated=True,
        )  # fmt: skip
        assert found.dg is not None
        self.dg = self.dg + s.gate * sum_heads(found.dg, self.sizes.gate)
        for name, y in ((s.query, found.dx), (s.keys, found.dk), (s.values, found.dv)):
            self.add(name, y)
        self.residuals(s, dy, ())
        return _of_initial(initial, found.dinitial, factor, hs, dy)

    def add_number(self, name: str, y: Tensor) -> None:
        """Adds to the gradient of a per-token number."""
        y = sum_heads(y, self.x[name].shape[2])
        self.d[name] = self.d[name] + y if name in self.d else y


def ends_of(dfinal: Tensor | None, factor: float, group: int) -> Tensor | None:
    """What enters an adjoint from behind, of a final state that a group of heads shares."""
    return None if dfinal is None else per_head(dfinal if factor == 1.0 else dfinal / factor, group)


def _of_initial(initial: Tensor | None, final: Tensor | None, factor: float, hs: int, like: Tensor) -> Tensor:
    """The gradient of an initial state of ``hs`` heads, from what its adjoint ends with; empty without one."""
    if initial is None:
        return like.new_empty(0)
    assert final is not None
    return shared(final * factor, hs).to(initial.dtype)


def _scaled(y: Tensor, gain: float | Tensor) -> Tensor:
    if isinstance(gain, Tensor) and gain.shape[2] != y.shape[2]:
        gain = gain.repeat_interleave(y.shape[2] // gain.shape[2], 2)
    return y * gain


def _gate_gradient(p, sizes, back, initial, dinitial, cu_seqlens) -> Tensor:
    """``dg``: the sums of dc over all later tokens, with what the decay up to an end does to the state there.

    All of dc together, what the decay up to the last token does to the final state included, is what scaling the
    initial state does. (Reversed stages have theirs at the last token.) Stages in pairs have theirs already.
    """
    walked = [not back.goes_in_pairs(s, sizes.of[s.out][0]) for s in p.stages]
    if not any(walked):
        return back.dg
    total = None
    for s, state, dstate, by_walks in zip(p.stages, initial, dinitial, walked, strict=True):
        if state is not None and dstate is not None and by_walks:
            y = s.gate * (state * dstate).sum((-1, -2)).unflatten(1, (sizes.gate, -1)).sum(-1)
            total = y if total is None else total + y
    sums = sum_later if p.stages[0].mode == "reversed" else minus_earlier
    dg = sums(back.dc, total, cu_seqlens) + back.dg
    return dg - back.dread if isinstance(back.dread, Tensor) else dg
