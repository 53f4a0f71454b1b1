"""Starts kernels with little work on the host.

Triton's own launch looks at every argument of every call in Python; for kernels with dozens of strides this takes
longer than the kernels run. `launch` keeps the compiled kernel by what could make another one necessary: which
pointers are there, their dtypes and alignment, and whether sizes are 1 or multiples of 16 (not those marked
`do_not_specialize`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret

_compiled: dict[tuple, Any] = {}
_specialized: dict[Any, tuple[bool, ...]] = {}


def launch(kernel, programs: int, *args, warps: int = 4, stages: int = 3, **constants) -> None:
    """Runs ``programs`` instances of a kernel on the device of its tensors, whatever the current device is.

    Args:
        args: all arguments that are not ``tl.constexpr``, in order: pointers (tensors or None), then ints and floats.
        constants: those that are, in the order of the kernel's signature.
    """
    if programs == 0:
        return
    if INTERPRETED:
        kernel[(programs,)](*args, **constants)
        return
    pointers = [x for x in args if x is None or isinstance(x, Tensor)]
    device = next(x.device for x in pointers if x is not None)
    what = (kernel, device.index, warps, stages, *constants.values())
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
            compiled = kernel[(programs,)](*args, **constants, num_warps=warps, num_stages=stages)
        else:
            compiled[(programs, 1, 1)](*args, *constants.values())
    if compiled is not None:
        if len(_compiled) > 100_000:
            _compiled.clear()
        _compiled[exact] = _compiled[key] = compiled


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
