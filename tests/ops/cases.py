"""Inputs for the operator tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hla
from hla import reference
from hla.ops import dispatch, linear_attn
from hla.ops.checks import check_call

F64 = torch.float64

# Every operator with the orders that are its own code path: name -> (op, order).
OPERATORS = {
    "linear_attn": ("linear_attn", None),
    "hla2": ("hla2", None),
    "ahla": ("ahla", None),
    "hla3": ("hla3", None),
    "ahla1": ("ahla", 1),
    "ahla3": ("ahla", 3),
    "hla_n1": ("hla_n", 1),
    "hla_n4": ("hla_n", 4),
    "hla_n5": ("hla_n", 5),
    "hla_q1": ("hla_q", 1),
    "hla_q4": ("hla_q", 4),
}

# What can be varied about a call, as keyword makers: option -> function(rand, B, T, HQ, HKV, K) -> keywords.
OPTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": lambda r, *s: {},
    "g": lambda r, B, T, HQ, HKV, K: dict(g=-r(B, T, HKV).abs()),
    "p=k": lambda r, *s: dict(p="k"),
    "p=HQ": lambda r, B, T, HQ, HKV, K: dict(p=r(B, T, HQ, K)),
    "p=HKV": lambda r, B, T, HQ, HKV, K: dict(p=r(B, T, HKV, K)),
    "ridge": lambda r, *s: dict(ridge=0.3),
    "gain": lambda r, *s: dict(gain=-0.7),
    "ridge,gain per token": lambda r, B, T, HQ, HKV, K: dict(ridge=r(B, T, HQ), gain=r(B, T, HQ)),
    "g,p=k,per token": lambda r, B, T, HQ, HKV, K: dict(
        g=-r(B, T, HKV).abs(), p="k", ridge=r(B, T, HKV), gain=r(B, T, HKV)
    ),
    "scale": lambda r, *s: dict(scale=1.3),
    "normalize": lambda r, *s: dict(normalize=True, eps=0.5),
    "g,normalize,ridge": lambda r, B, T, HQ, HKV, K: dict(
        g=-r(B, T, HKV).abs(), normalize=True, eps=0.5, ridge=r(B, T, HQ)
    ),
    "value_ridge,value_gain": lambda r, B, T, HQ, HKV, K: dict(
        value_ridge=0.4, value_gain=r(B, T, HQ), g=-r(B, T, HKV).abs()
    ),
    "nodes": lambda r, B, T, HQ, HKV, K: dict(nodes=0.3 + r(HQ, 5).abs(), ridge=0.5),
    "g,nodes,ridge per token": lambda r, B, T, HQ, HKV, K: dict(
        g=-r(B, T, HKV).abs(), nodes=0.3 + r(B, T, HQ, 5).abs(), ridge=0.3 + r(B, T, HQ).abs()
    ),
}


def applies(name: str, option: str) -> bool:
    """Whether an operator takes an option."""
    if "nodes" in option:
        return name == "hla_q4"
    if name.startswith("hla_q"):
        return option in ("plain", "g", "scale")
    if name == "linear_attn":
        return option in ("plain", "g", "scale", "normalize")
    return not option.startswith("value") or name == "hla3"


CASES = [(name, option) for name in OPERATORS for option in OPTIONS if applies(name, option)]
case = pytest.mark.parametrize("name,option", CASES)
operator = pytest.mark.parametrize("name", OPERATORS)


class Inputs:
    """q, k, v and keywords of one call; ``positive`` gives features for which normalisation is well behaved."""

    def __init__(self, name, option="plain", *, B=2, T=37, HQ=4, HKV=2, K=3, V=5, dtype=F64, seed=0):
        self.op, self.order = OPERATORS[name]
        generator = torch.Generator().manual_seed(seed)
        r = lambda *s: torch.randn(*s, dtype=F64, generator=generator).to(dtype)  # noqa: E731
        positive = "normalize" in option
        feature = (lambda x: x.abs()) if positive else (lambda x: x)
        self.q, self.k, self.v = feature(r(B, T, HQ, K)), feature(r(B, T, HKV, K)), r(B, T, HKV, V)
        self.kw = OPTIONS[option](r, B, T, HQ, HKV, K)
        if positive:
            self.kw |= {n: x.abs() for n, x in self.kw.items() if n == "ridge" and isinstance(x, Tensor)}
        if self.order is not None and not (self.op == "ahla" and self.order == 2):
            self.kw["order"] = self.order

    def tensors(self) -> dict[str, Tensor]:
        """All tensor inputs by name."""
        return {"q": self.q, "k": self.k, "v": self.v} | {n: x for n, x in self.kw.items() if isinstance(x, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]):
        """(q, k, v, keywords) with the given tensors in place of the own."""
        kw = {n: tensors.get(n, x) for n, x in self.kw.items()}
        return tensors["q"], tensors["k"], tensors["v"], kw

    def chunk(self, **more):
        return getattr(hla, self.op)(self.q, self.k, self.v, **self.kw, **more)

    def recurrent(self, **more):
        call = check_call(self.op, self.q, self.k, self.v, **self.kw, **more)
        return dispatch(self.op, "recurrent", "torch", self.q.device)(call)

    def reference(self) -> Tensor:
        return getattr(reference, self.op)(self.q, self.k, self.v, **self.kw)

    def tokens(self, start: int, end: int) -> Inputs:
        """The same call on tokens ``start .. end - 1``."""
        part = object.__new__(Inputs)
        part.op, part.order = self.op, self.order
        cut = lambda x: x[:, start:end] if isinstance(x, Tensor) and x.dim() > 2 else x  # noqa: E731
        part.q, part.k, part.v = cut(self.q), cut(self.k), cut(self.v)
        part.kw = {n: cut(x) for n, x in self.kw.items()}
        return part


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest true value."""
    if truth.numel() == 0:
        assert x.shape == truth.shape
        return 0.0
    return float(
        (x.detach().double() - truth.detach().double()).abs().max()
        / truth.detach().double().abs().max().clamp(min=1e-30)
    )


def gradients(output: Tensor, leaves, do: Tensor | None = None) -> list[Tensor]:
    """Gradients of ``(output * do).sum()``, zeros for leaves the output does not depend on."""
    leaves = list(leaves)
    grads = torch.autograd.grad(output, leaves, do, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def assert_close(x: Tensor, truth: Tensor, tolerance: float = 1e-12, what: str = "") -> None:
    assert x.shape == truth.shape, f"{what}: {x.shape} != {truth.shape}"
    error = relative_error(x, truth)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_states_close(state, truth, tolerance: float = 1e-12) -> None:
    assert type(state) is type(truth)
    for field, x, y in zip(truth._fields, state, truth, strict=True):
        assert (x is None) == (y is None), field
        if y is not None:
            assert_close(x, y, tolerance, field)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 tokens, one to a block: every border of the chunk form is crossed by a few tokens."""
    monkeypatch.setattr(linear_attn, "CHUNK", 4)
    monkeypatch.setattr(linear_attn, "BLOCK_NUMBERS", 1)
