"""Runs kernels written in Gluon on the CPU, program after program: what Triton's interpreter does for those in Triton.

The function of a kernel is called with a stand-in for Gluon's language: tensors are PyTorch's, layouts mean nothing,
and pointers know their tensor, so that reading or writing outside of it is an error. Instructions written in PTX have
stand-ins by name. Copies to shared memory and products of the matrix units are asynchronous: they are done at once, or
as late as the kernel allows, when it waits for them, and what was not waited for is not there. A kernel that overlaps
with the launch before it reads nothing of that one, and writes nothing, ahead of its wait. Not covered: what a compiler
makes of it, and threads that should wait for each other.
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


class Waits:
    """Whether a kernel has waited for the launch before it."""

    over = False

    def wait(self, _pdl: bool) -> None:
        self.over = True


class Pointer:
    """Places in a contiguous piece of memory, as numbers of elements from its start.

    late: it must not be read before the kernel has waited for the previous launch (nor anything be written before).
    """

    def __init__(self, memory: Tensor, at: Any = 0, waits: Waits | None = None, late: bool = False):
        self.memory, self.at, self.waits, self.late = memory, torch.as_tensor(at), waits, late
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset, self.waits, self.late)

    def allows(self, writing: bool) -> bool:
        return self.waits is None or self.waits.over or not (writing or self.late)


class Shared:
    """A tensor in shared memory, or several of them; as fresh as it is it holds NaN."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < len(self.tensor)
        return Shared(self.tensor[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        assert 0 <= start and start + length <= len(self.tensor)
        return Shared(self.tensor[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.tensor.permute(order))

    def store(self, x: Tensor) -> None:
        assert x.shape == self.tensor.shape and x.dtype == self.tensor.dtype
        self.tensor.copy_(x)

    def load(self, _layout: Any) -> Tensor:
        return _value(self.tensor.clone())


def _load(pointer: Pointer, mask: Any = True, other: float = float("nan")) -> Tensor:
    assert pointer.allows(writing=False)
    at, mask = torch.broadcast_tensors(pointer.at, torch.as_tensor(mask))
    assert ((at >= 0) & (at < pointer.memory.numel()))[mask].all()
    found = pointer.memory[torch.where(mask, at, 0)]
    return _value(found if mask.all() else torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def _store(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    assert pointer.allows(writing=True)
    at, value, mask = torch.broadcast_tensors(pointer.at, torch.as_tensor(value), torch.as_tensor(mask))
    assert ((at >= 0) & (at < pointer.memory.numel()))[mask].all() and value.dtype == pointer.memory.dtype
    pointer.memory[at[mask]] = value[mask]


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    return _value(torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)))


def _function(name: str) -> Any:
    return lambda x, *more: getattr(torch, name)(_value(x), *map(torch.as_tensor, more))


def _full(shape: list[int], number: float, dtype: torch.dtype, _layout: Any = None) -> Tensor:
    return _value(torch.full(shape, number, dtype=dtype))


class Product:
    """What a product of the matrix units will be."""

    def __init__(self, a: Any, b: Any, acc: Any, use_acc: bool):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Tensor | None = None
        self.awaited = False

    def compute(self) -> None:
        if self.value is None:
            a, b = (x.tensor if isinstance(x, Shared) else x for x in (self.a, self.b))
            acc = self.acc.value if isinstance(self.acc, Product) else self.acc
            assert a.dtype == b.dtype == torch.bfloat16 and acc.dtype == torch.float32
            product = a.float() @ b.float()
            assert product.shape == acc.shape
            self.value = _value(acc + product if self.use_acc else product)


class Asynchronous:
    """The copies and products of a program that were started.

    late: "copies" or "products", which of them are done when the program waits for them instead of at once.
    """

    def __init__(self, late: str):
        self.late = late
        self.copies: list[tuple[Shared, Pointer, Any]] = []
        self.groups: list[list[tuple[Shared, Pointer, Any]]] = []
        self.products: list[Product] = []

    def copy(self, to: Shared, source: Pointer, mask: Any = True) -> None:
        if self.late == "copies":
            to.tensor.fill_(float("nan"))
        else:
            self._done(to, source, mask)
        self.copies.append((to, source, mask))

    def _done(self, to: Shared, source: Pointer, mask: Any) -> None:
        to.store(_load(source, mask, 0.0).to(to.tensor.dtype))  # (states that Triton's interpreter has in float32)

    def commit_group(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait_group(self, left: int) -> None:
        while len(self.groups) > left:
            for copy in self.groups.pop(0):
                if self.late == "copies":
                    self._done(*copy)

    def product(self, a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        assert is_async
        product = Product(a, b, acc, use_acc)
        if self.late != "products":
            product.compute()
        self.products.append(product)
        return product

    def wait_products(self, left: int, products: tuple[Any, ...]) -> Any:
        while len(self.products) > left:
            product = self.products.pop(0)
            product.compute()
            product.awaited = True
        found = tuple(x.value if isinstance(x, Product) and x.awaited else x for x in products)
        return found[0] if len(found) == 1 else found


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


LATE = {"Y", "WRITE", "DECAY", "RIDGE_LOGIT", "GATE"}  # what the launch before writes, of kernels that overlap with it


def _stand_ins(late: str) -> dict[str, Any]:
    started = Asynchronous(late)
    return {
        "_barrier": lambda: None,
        "_exponential": torch.exp,
        "_wide": lambda x: x.to(torch.float32),
        "_zero": lambda x: x * 0,
        "_copy": started.copy,
        "_now": lambda x: x,
        "_as": _as,
        "async_copy": started,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": started.product,
        "warpgroup_mma_wait": started.wait_products,
    }


def launch(kernel: Any, programs: int, *args: Any, late: str = "copies", **constants: Any) -> None:
    """As `hla.kernels.launch.launch`, on CPU tensors. late: see `Asynchronous`."""
    options = {n: constants.pop(n) for n in ("warps", "stages", "pdl", "registers") if n in constants}
    if kernel.arg_names[-1] == "PDL":
        constants["PDL"] = options["pdl"]
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(args)
    assert list(constants) == [n for n in kernel.arg_names if n in constants]  # (passed by position on a GPU)
    for program in range(programs):
        waits = Waits() if "PDL" in constants else None
        # (A tensor may be a part of another one, at any distance of its rows.)
        values = {
            n: Pointer(_memory(x), 0, waits, n in LATE) if isinstance(x, Tensor) else x
            for n, x in zip(names, args, strict=True)
        }
        stand_ins = _stand_ins(late) | ({} if waits is None else {"_wait": waits.wait})
        _callable(kernel, _language(program), stand_ins, {})(**values, **constants)


def function(part: Any) -> Any:
    """A function that kernels call, on tensors."""
    call = _callable(part, _language(0), _stand_ins("copies"), {})
    return lambda x, *more: call(_value(x), *more)


def _callable(kernel: Any, language: Any, stand_ins: dict[str, Any], known: dict[int, dict]) -> Any:
    """The function of a kernel, or of a part of one, in which all names of its module are stand-ins that have one."""
    own = kernel.fn.__globals__
    names = known.get(id(own))
    if names is None:
        names = known[id(own)] = dict(own)
        names["gl"] = language
        for name, x in own.items():
            if name in stand_ins:
                names[name] = stand_ins[name]
            elif is_gluon(x):
                names[name] = _callable(x, language, stand_ins, known)
    return types.FunctionType(kernel.fn.__code__, names)


def is_gluon(x: Any) -> bool:
    return hasattr(x, "is_gluon") and x.is_gluon()


def _memory(x: Tensor) -> Tensor:
    """From the first to the last element of a tensor."""
    return x.as_strided((1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)),), (1,))


def on_the_cpu(patch: pytest.MonkeyPatch, *modules: Any, late: str = "copies") -> list[str]:
    """From now on the modules take the kernels in Gluon, and launch them here; the names of those that were.

    late: see `Asynchronous`.
    """
    launched = []

    def route(original: Any) -> Any:
        def function(kernel: Any, *args: Any, **options: Any) -> None:
            if is_gluon(kernel):
                launched.append(kernel.fn.__name__)
                launch(kernel, *args, late=late, **options)
            else:
                original(kernel, *args, **options)

        return function

    for module in modules:
        patch.setattr(module, "launch", route(module.launch))
        if hasattr(module, "has_gluon"):
            patch.setattr(module, "has_gluon", lambda capability: True)
    return launched
