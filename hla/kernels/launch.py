"""Starts kernels with little work on the host.

Triton's own launch looks at every argument of every call in Python; for kernels with dozens of strides this takes
longer than the kernels run. `launch` keeps the compiled kernel by what could make another one necessary: which
pointers are there, their dtypes and alignment, and whether sizes are 1 or multiples of 16 (not those marked
`do_not_specialize`).

Short kernels that follow each other may overlap ("programmatic dependent launch", from compute capability 9.0 on): such
a kernel starts before the one ahead of it has ended, asks for what that one does not write, and then waits for it
(`wait`). As each lets the next one start only behind its own wait, there are never more than two at a time: when a
kernel starts, all launches before the previous one are complete, and what they wrote may be read ahead of the wait.
Every kernel writes behind its wait, when nothing before it still reads.

The exception is a kernel that shares nothing with the one ahead of it but what both read (`pairs.walk_states`, LATE).
It runs beside that one from the start and waits before it ends; what follows it is launched without overlap.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hla.kernels import ahead

INTERPRETED = triton.knobs.runtime.interpret

_compiled: dict[tuple, Any] = {}
_specialized: dict[Any, tuple[bool, ...]] = {}


@triton.jit
def wait(PDL: tl.constexpr):
    """Waits for all that the previous kernel writes, then lets the next one start (never the other way round)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers, mask):
    """Asks for lines of memory, of 128 bytes, to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [pointers.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def launch(
    kernel, programs: int, *args, warps: int = 4, stages: int = 3, pdl: bool = False, registers: int | None = None,
    **constants,
) -> None:  # fmt: skip
    """Runs ``programs`` instances of a kernel on the device of its tensors, whatever the current device is.

    Args:
        args: all arguments that are not ``tl.constexpr``, in order: pointers (tensors or None), then ints and floats.
        registers: of a thread at most.
        pdl: the kernel overlaps with the one before it. Its last parameter is ``PDL: tl.constexpr``, which is passed
            (False in the interpreter).
        constants: those that are, in the order of the kernel's signature.
    """
    if programs == 0:
        return
    if kernel.arg_names[-1] == "PDL":
        constants["PDL"] = pdl and not INTERPRETED
    if INTERPRETED:
        kernel[(programs,)](*args, **constants)
        return
    pointers = [x for x in args if x is None or isinstance(x, Tensor)]
    device = next(x.device for x in pointers if x is not None)
    notes = ahead.local.notes
    if notes is not None:
        device = ahead.real(device)
    what = (kernel, device.index, warps, stages, registers, *constants.values())
    if notes is not None:
        key = (what, *_kinds(kernel, args))
        if key not in _compiled:
            assert tuple(constants) == tuple(p.name for p in kernel.params if p.is_constexpr)
            kinds = [_Like(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in args]
            options = _options(constants, warps, stages, registers)
            if device.type == "cuda":  # what Triton sets up at the first use is not for several threads at once
                with _current(device):
                    kernel.device_caches[device.index]
            notes[key] = functools.partial(_compile, kernel, device, kinds, constants | options)
        return
    # The same numbers as before, as they are in training, need not be looked at one by one.
    exact = (
        what,
        args[len(pointers) :],
        *[None if x is None else (x.dtype, x.data_ptr() % 16) for x in pointers],
    )
    compiled = _compiled.get(exact)
    with _current(device):
        if compiled is not None:
            compiled[(programs, 1, 1)](*args, *constants.values())
            return
        key = (what, *_kinds(kernel, args))
        compiled = _compiled.get(key)
        if compiled is None:
            assert tuple(constants) == tuple(p.name for p in kernel.params if p.is_constexpr)
            ahead.wait_for(key)
            compiled = kernel[(programs,)](*args, **constants, **_options(constants, warps, stages, registers))
        else:
            compiled[(programs, 1, 1)](*args, *constants.values())
    if compiled is not None:
        if len(_compiled) > 100_000:
            _compiled.clear()
        _compiled[exact] = _compiled[key] = compiled


def _options(constants: dict[str, Any], warps: int, stages: int, registers: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if constants.get("PDL"):
        options["launch_pdl"] = True
    if registers is not None:
        options["maxnreg"] = registers
    return options


class _Like:
    """What the compiled code depends on, of a tensor that is not there: its dtype, and how it is aligned."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


def _compile(kernel, device: torch.device, args: list, settings: dict[str, Any]) -> None:
    """args: as for a launch, but for tensors what they are like."""
    with _current(device):
        compiled = kernel.warmup(*args, grid=(1,), **settings)
        with contextlib.suppress(Exception):  # in Triton 3.6 what starts a kernel is compiled, too, and kept on disk
            triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


def copies_whole(*tensors: Tensor) -> bool:
    """Whether rows of these can be copied to shared memory as they are, 16 bytes at a time, as far as `launch` sees."""
    return all(
        x.dtype == torch.bfloat16
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(n % 16 == 0 for n in x.stride()[:-1])
        for x in tensors
    )


def to_copy_whole(x: Tensor) -> Tensor:
    """x, or one that `copies_whole`."""
    return x if copies_whole(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _kinds(kernel, args: tuple) -> list:
    """What the compiled code depends on, per argument."""
    specialized = _specialized.get(kernel)
    if specialized is None:
        specialized = tuple(not p.do_not_specialize for p in kernel.params)
        _specialized[kernel] = specialized
    kinds: list = []
    for x, special in zip(args, specialized, strict=False):
        if x is None:
            kinds.append(None)
        elif isinstance(x, Tensor):
            kinds.append(x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,))
        elif isinstance(x, float):
            kinds.append(0.5)
        elif special:
            kinds.append(1 if x == 1 else 16 if x % 16 == 0 else 2 if -(2**31) <= x < 2**31 else 64)
            if x % 16 == 0 and not -(2**31) <= x < 2**31:
                kinds.append(64)
        else:
            kinds.append(2 if -(2**31) <= x < 2**31 else 64)
    return kinds


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
