"""Runs kernels written in Gluon on the CPU, program after program: what Triton's interpreter does for those in Triton.

The function of a kernel is called with a stand-in for Gluon's language: tensors are PyTorch's, layouts mean nothing,
and pointers know their tensor, so that reading or writing outside of it is an error. Instructions written in PTX,
products of the matrix units and asynchronous copies have stand-ins by name; copies and products are done at once. Not
covered: what a compiler makes of it, and the order of threads.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor


class Value(torch.Tensor):
    """A tensor of a kernel, which nothing changes: ``x += y`` is another one."""

    type = types.SimpleNamespace(layout=None)
    __iadd__, __isub__, __imul__ = (getattr(Tensor, name) for name in ("__add__", "__sub__", "__mul__"))


def _value(x: Any) -> Tensor:
    return torch.as_tensor(x).as_subclass(Value)


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

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.tensor[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.tensor.permute(order))

    def store(self, x: Tensor) -> None:
        assert x.shape == self.tensor.shape and x.dtype == self.tensor.dtype
        self.tensor.copy_(x)

    def load(self, _layout: Any) -> Tensor:
        return _value(self.tensor.clone())


def _load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
    at, mask = torch.broadcast_tensors(pointer.at, torch.as_tensor(mask))
    assert ((at >= 0) & (at < pointer.memory.numel()))[mask].all()
    other = torch.tensor(other, dtype=pointer.memory.dtype)
    return _value(torch.where(mask, pointer.memory[torch.where(mask, at, 0)], other))


def _store(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    at, value, mask = torch.broadcast_tensors(pointer.at, torch.as_tensor(value), torch.as_tensor(mask))
    assert ((at >= 0) & (at < pointer.memory.numel()))[mask].all() and value.dtype == pointer.memory.dtype
    pointer.memory[at[mask]] = value[mask]


def _copy(to: Shared, source: Pointer, mask: Any = True) -> None:
    to.store(_load(source, mask).to(to.tensor.dtype))  # (states that Triton's interpreter has in float32)


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    return _value(torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)))


def _function(name: str) -> Any:
    return lambda x, *more: getattr(torch, name)(_value(x), *map(torch.as_tensor, more))


def _full(shape: list[int], number: float, dtype: torch.dtype, _layout: Any = None) -> Tensor:
    return _value(torch.full(shape, number, dtype=dtype))


def _product(a: Any, b: Any, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    a, b = (x.tensor if isinstance(x, Shared) else x for x in (a, b))
    assert a.dtype == b.dtype == torch.bfloat16 and acc.dtype == torch.float32
    product = a.float() @ b.float()
    assert product.shape == acc.shape
    return _value(acc + product if use_acc else product)


def _waited(_left: int, products: tuple[Tensor, ...]) -> Any:
    return products[0] if len(products) == 1 else products


def _as(memory: Shared, dtype: torch.dtype, shape: list[int], _layout: Any = None) -> Shared:
    """The same memory under another name."""
    return Shared(memory.tensor.view(-1).view(dtype).view(shape))


def _assert(condition: bool) -> None:
    assert condition


def _language(program: int) -> types.SimpleNamespace:
    layout = lambda *_, **__: None  # noqa: E731
    layout.get_default_for = layout  # type: ignore[attr-defined]
    names = ("BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "NVMMASharedLayout", "NVMMADistributedLayout")
    return types.SimpleNamespace(
        **{name: _function(name) for name in ("exp", "exp2", "log", "cos", "rsqrt", "minimum", "maximum")},
        **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int64")},
        **dict.fromkeys((*names, "DotOperandLayout"), layout),
        program_id=lambda axis: _value(program), static_range=range, static_assert=_assert, constexpr=None,
        arange=lambda start, stop, layout=None: _value(torch.arange(start, stop)), full=_full,
        zeros=lambda shape, dtype, layout: _full(shape, 0.0, dtype), load=_load, store=_store, where=_where,
        sum=lambda x, axis: _value(x).sum(axis), max=lambda x, axis: x.amax(axis), split=lambda x: x.unbind(-1),
        join=lambda a, b: torch.stack((a, b), -1), expand_dims=lambda x, axis: x.unsqueeze(axis),
        convert_layout=lambda x, layout: x, set_auto_layout=lambda x, layout: x,
        associative_scan=lambda x, axis, add: x.cumsum(axis),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, float("nan"), dtype=dtype)),
    )  # fmt: skip


STAND_INS: dict[str, Any] = {
    "_barrier": lambda: None,
    "_wait": lambda PDL: None,
    "_exponential": torch.exp,
    "_wide": lambda x: x.to(torch.float32),
    "_zero": lambda x: x * 0,
    "_copy": _copy,
    "_as": _as,
    "async_copy": types.SimpleNamespace(commit_group=lambda: None, wait_group=lambda left: None),
    "fence_async_shared": lambda: None,
    "warpgroup_mma": _product,
    "warpgroup_mma_wait": _waited,
}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """As `hla.kernels.launch.launch`, on CPU tensors."""
    options = {n: constants.pop(n) for n in ("warps", "stages", "pdl", "registers") if n in constants}
    if kernel.arg_names[-1] == "PDL":
        constants["PDL"] = options["pdl"]
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(args)
    # (A tensor may be a part of another one, at any distance of its rows.)
    values = [Pointer(_memory(x)) if isinstance(x, Tensor) else x for x in args]
    for program in range(programs):
        _callable(kernel, _language(program), {})(**dict(zip(names, values, strict=True)), **constants)


def function(part: Any) -> Any:
    """A function that kernels call, on tensors."""
    call = _callable(part, _language(0), {})
    return lambda x, *more: call(_value(x), *more)


def _callable(kernel: Any, language: Any, known: dict[int, dict]) -> Any:
    """The function of a kernel, or of a part of one, in which all names of its module are stand-ins that have one."""
    own = kernel.fn.__globals__
    names = known.get(id(own))
    if names is None:
        names = known[id(own)] = dict(own)
        names["gl"] = language
        for name, x in own.items():
            if name in STAND_INS:
                names[name] = STAND_INS[name]
            elif is_gluon(x):
                names[name] = _callable(x, language, known)
    return types.FunctionType(kernel.fn.__code__, names)


def is_gluon(x: Any) -> bool:
    return hasattr(x, "is_gluon") and x.is_gluon()


def _memory(x: Tensor) -> Tensor:
    """From the first to the last element of a tensor."""
    return x.as_strided((1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)),), (1,))


def on_the_cpu(patch: pytest.MonkeyPatch, *modules: Any) -> list[str]:
    """From now on the modules take the kernels in Gluon, and launch them here; the names of those that were."""
    launched = []

    def route(original: Any) -> Any:
        def function(kernel: Any, *args: Any, **options: Any) -> None:
            if is_gluon(kernel):
                launched.append(kernel.fn.__name__)
            (launch if is_gluon(kernel) else original)(kernel, *args, **options)

        return function

    for module in modules:
        patch.setattr(module, "launch", route(module.launch))
        if hasattr(module, "has_gluon"):
            patch.setattr(module, "has_gluon", lambda capability: True)
    return launched
