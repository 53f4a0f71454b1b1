"""What is measured at a shape: the operators, their variants, and the peers, each a forward function and its leaves.

flash-linear-attention is imported when first asked for; without it its entries are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operators import operators, sdpa
from hla import hla2

OWN = ("hla2", "linear_attn", "hla_q default form", "ahla", "hla3")
FLASH, CUDNN, COMPOSED = "sdpa flash", "sdpa cudnn", "fla composed hla2"
PEERS = ("sdpa-flash", "sdpa-cudnn", "fla-linear", "fla-composed", "fla-gated-delta")
COUNTED_AS = {"hla_q default form": "hla_q"}
SEQUENCES = 16  # of the packed variant


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "8x4096x16x128"."""
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))


@dataclass(frozen=True)
class Entry:
    """One row: what computes the output, whose gradients a backward pass takes, and as what its cost is counted."""

    name: str
    function: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    do: Tensor
    counted_as: str = ""  # a key of `counts.COSTS`, or "": not counted
    kv_heads: int = 0
    sequences: int = 0  # packed into one row, or 0: one per row of the batch
    same_as: str = ""  # another entry that computes the same
    has_backward: bool = True

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function()

    def both(self) -> tuple[Tensor, ...]:
        o = self.function()
        return torch.autograd.grad(o, self.leaves, self.do.view(o.shape))


class Inputs:
    """Normalised bfloat16 q, k, v and do of a shape, and float32 decay and ridge per token; all but do are leaves."""

    def __init__(self, shape: Shape, device: str):
        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.device, self.generator = shape, device, generator

        def new() -> Tensor:
            x = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
            return F.normalize(x, dim=-1)

        q, k, v, self.do = (new() for _ in range(4))
        self.q, self.k, self.v = (x.requires_grad_() for x in (q, k, v))
        self.g = torch.full(shape[:3], -0.02, device=device).requires_grad_()
        self.ridge = torch.full(shape[:3], 1.02, device=device).requires_grad_()

    def borders(self) -> Tensor:
        """Cumulated random lengths of `SEQUENCES` sequences that fill batch x length tokens."""
        tokens = self.shape.batch * self.shape.length
        cuts = torch.randperm(tokens - 1, generator=self.generator, device=self.device)[: SEQUENCES - 1] + 1
        ends = torch.tensor([0, tokens], device=self.device)
        return torch.cat([ends[:1], cuts.sort().values, ends[1:]]).int()


def _own(
    inputs: Inputs,
    names: tuple[str, ...],
    suffix: str = "",
    tensors: tuple[Tensor, ...] = (),
    cu_seqlens: Tensor | None = None,
) -> list[Entry]:
    """Entries of operators on q, k, v, g, ridge, by default those of the inputs."""
    q, k, v, g, ridge = tensors or (inputs.q, inputs.k, inputs.v, inputs.g, inputs.ridge)
    functions = operators(q, k, v, g=g, ridge=ridge, cu_seqlens=cu_seqlens)
    return [
        Entry(
            name + suffix,
            functions[name],
            (q, k, v, g, ridge) if name.startswith("hla_q") else (q, k, v),
            inputs.do,
            COUNTED_AS.get(name, name),
            k.shape[2],
            0 if cu_seqlens is None else len(cu_seqlens) - 1,
        )
        for name in names
    ]


def own(inputs: Inputs) -> list[Entry]:
    return _own(inputs, OWN)


def variants(inputs: Inputs) -> list[Entry]:
    """hla2 with a gate; hla_q with four query heads to one key head; hla2 and hla_q on packed sequences."""
    tensors = inputs.q, inputs.k, inputs.v, inputs.g, inputs.ridge
    q, k, v, g, ridge = tensors
    quarter = lambda x: x.detach()[:, :, : max(1, inputs.shape.heads // 4)].contiguous().requires_grad_()  # noqa: E731
    grouped = q, quarter(k), quarter(v), quarter(g), ridge
    packed = tuple(x.detach().flatten(0, 1)[None].requires_grad_() for x in tensors)

    def gated() -> Tensor:
        return hla2(q, k, v, g=g)[0]

    return [
        Entry("hla2, gated", gated, (q, k, v, g), inputs.do, "hla2", k.shape[2]),
        *_own(inputs, ("hla_q default form",), ", grouped", grouped),
        *_own(inputs, ("hla2", "hla_q default form"), ", packed", packed, inputs.borders()),
    ]


def softmax(inputs: Inputs, peers: list[str]) -> list[Entry]:
    """Scaled dot product attention by each backend asked for; a backend that is not there raises when called."""
    q, k, v = leaves = inputs.q, inputs.k, inputs.v

    def of(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return run

    entries = []
    for peer, name, backend, same_as in (
        ("sdpa-flash", FLASH, SDPBackend.FLASH_ATTENTION, ""),
        ("sdpa-cudnn", CUDNN, SDPBackend.CUDNN_ATTENTION, FLASH),
    ):
        if peer in peers:
            entries.append(Entry(name, of(backend), leaves, inputs.do, "softmax", k.shape[2], same_as=same_as))
    return entries


def fla(inputs: Inputs, peers: list[str]) -> list[Entry]:
    """First order, second order composed of it, and the gated delta rule, of flash-linear-attention.

    Up to 64 dimensions a head also by its ``fused_chunk``, which holds a whole state in registers.

    Raises:
        ImportError: without the package.
    """
    simple = importlib.import_module("fla.ops.simple_gla")
    delta = importlib.import_module("fla.ops.gated_delta_rule")
    q, k, v = leaves = inputs.q, inputs.k, inputs.v
    scale = inputs.shape.dim**-0.5
    forms = {"chunk": simple.chunk_simple_gla}
    if inputs.shape.dim <= 64:
        forms["fused_chunk"] = simple.fused_chunk_simple_gla
    entries = []
    for form, attend in forms.items():

        def linear(attend: Callable = attend) -> Tensor:
            return attend(q, k, v, scale=scale)[0]

        def composed(attend: Callable = attend) -> Tensor:
            return attend(q, attend(q, k, k, scale=scale)[0], v, scale=scale)[0]

        if "fla-linear" in peers:
            name = f"fla linear ({form})"
            entries.append(Entry(name, linear, leaves, inputs.do, "linear_attn", k.shape[2], same_as="linear_attn"))
        if "fla-composed" in peers:
            name = f"{COMPOSED} ({form})"
            entries.append(Entry(name, composed, leaves, inputs.do, "hla2", k.shape[2], same_as="hla2"))
    if "fla-gated-delta" in peers:
        g, beta = inputs.g.detach(), torch.full(q.shape[:3], 0.5, device=inputs.device, dtype=q.dtype)

        def gated_delta() -> Tensor:
            return delta.chunk_gated_delta_rule(q=q, k=k, v=v, g=g, beta=beta, scale=scale)[0]

        entries.append(
            Entry("fla gated delta rule", gated_delta, leaves, inputs.do, kv_heads=k.shape[2], has_backward=False)
        )
    return entries
