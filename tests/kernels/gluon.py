"""Runs a kernel written in Gluon on the CPU, program after program: what Triton's interpreter does for those in Triton.

The function of the kernel is called with a stand-in for Gluon's language, whose tensors are PyTorch's, whose layouts
mean nothing, and whose pointers know their tensor: reading or writing outside of it is an error. Instructions written
in PTX have stand-ins by name. Not covered: what a compiler makes of it, and the order of threads.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


class Pointer:
    """Places in a contiguous piece of memory, as numbers of elements from its start."""

    def __init__(self, memory: Tensor, at: Any = 0):
        self.memory, self.at = memory, torch.as_tensor(at)
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


class Shared:
    """A tensor in shared memory, or several of them; as fresh as it is it holds NaN."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def index(self, i: Any) -> Shared:
        return Shared(self.tensor[int(i)])

    def store(self, x: Tensor) -> None:
        assert x.shape == self.tensor.shape and x.dtype == self.tensor.dtype
        self.tensor.copy_(x)

    def load(self, _layout: Any) -> Tensor:
        return self.tensor.clone()


def _load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
    at, mask = torch.broadcast_tensors(pointer.at, torch.as_tensor(mask))
    assert ((at >= 0) & (at < pointer.memory.numel()))[mask].all()
    return torch.where(mask, pointer.memory[torch.where(mask, at, 0)], torch.tensor(other, dtype=pointer.memory.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    at, value, mask = torch.broadcast_tensors(pointer.at, torch.as_tensor(value), torch.as_tensor(mask))
    assert ((at >= 0) & (at < pointer.memory.numel()))[mask].all() and value.dtype == pointer.memory.dtype
    pointer.memory[at[mask]] = value[mask]


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))


def _function(name: str) -> Any:
    return lambda x, *more: getattr(torch, name)(torch.as_tensor(x), *map(torch.as_tensor, more))


def _language(program: int) -> types.SimpleNamespace:
    names = ("exp", "exp2", "log", "cos", "rsqrt", "minimum", "maximum")
    return types.SimpleNamespace(
        **{name: _function(name) for name in names},
        float32=torch.float32, int64=torch.int64, program_id=lambda axis: torch.tensor(program),
        arange=lambda start, stop, layout: torch.arange(start, stop), load=_load, store=_store, where=_where,
        sum=lambda x, axis: torch.as_tensor(x).sum(axis),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, float("nan"), dtype=dtype)),
        static_range=range, static_assert=_assert, constexpr=None,
        **dict.fromkeys(("BlockedLayout", "SliceLayout", "SwizzledSharedLayout"), lambda *_: None),
    )  # fmt: skip


def _assert(condition: bool) -> None:
    assert condition


STAND_INS: dict[str, Any] = {
    "_barrier": lambda: None,
    "_wait": lambda PDL: None,
    "_exponential": torch.exp,
    "_copy": lambda to, source: to.store(_load(source)),
    "async_copy": types.SimpleNamespace(commit_group=lambda: None, wait_group=lambda left: None),
}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """As `hla.kernels.launch.launch`, on CPU tensors."""
    options = {n: constants.pop(n) for n in ("warps", "pdl", "registers") if n in constants}
    if kernel.arg_names[-1] == "PDL":
        constants["PDL"] = options["pdl"]
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(args)
    # (A tensor may be a part of another one, at any distance of its rows.)
    values = [Pointer(_memory(x)) if isinstance(x, Tensor) else x for x in args]
    for program in range(programs):
        everything = dict(kernel.fn.__globals__)
        everything["gl"] = _language(program)
        for name, x in list(everything.items()):
            if name in STAND_INS:
                everything[name] = STAND_INS[name]
            elif hasattr(x, "arg_names") and hasattr(x, "fn"):  # a function of the kernel
                everything[name] = types.FunctionType(x.fn.__code__, everything)
        types.FunctionType(kernel.fn.__code__, everything)(**dict(zip(names, values, strict=True)), **constants)


def _memory(x: Tensor) -> Tensor:
    """From the first to the last element of a tensor."""
    return x.as_strided((1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)),), (1,))
