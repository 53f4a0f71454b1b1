"""One function with a gradient of its own, for eager mode and for `torch.compile`.

Eager calls go through `torch.autograd.Function` (or straight to the kernels where no gradient is wanted), which costs
the host least. Under `torch.compile` and for fake tensors the same two functions are `torch.library` operators with
fakes and autograd, opaque to the compiler: no graph breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hla.kernels.ahead import expecting

Tensors = Sequence[Tensor | None]


class Operation:
    """``results = call(plan, *tensors)``, differentiable; a plan is a string (an argument that operators can have).

    Args:
        forward: ``(plan, *tensors, keep) -> (results, kept)``, keep: whether a backward pass may follow; ``fake`` the
            same without computing.
        backward: ``(plan, tensors, saved, grads, needed) -> gradients`` of those tensors that need one (else None);
            saved are the results from the ``first_saved(plan)``-th on, and what was kept.
        always_kept: so many of the tensors that forward keeps are there whatever the shapes, and in the fake; the rest
            only spares the backward pass work, and under `torch.compile` is left out. None: all of them.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., tuple[list[Tensor], list[Tensor]]],
        fake: Callable[..., tuple[list[Tensor], list[Tensor]]],
        backward: Callable[[str, Tensors, Tensors, Tensors, Sequence[bool]], list[Tensor | None]],
        first_saved: Callable[[str], int],
        always_kept: int | None = None,
    ):
        self.forward, self.backward, self.first_saved = forward, backward, first_saved

        @torch.library.custom_op(f"hla::{name}", mutates_args=())
        def op(tensors: list[Tensor], present: list[bool], plan: str) -> list[Tensor]:
            everything = _spread(tensors, present)
            with expecting(self, plan, everything, [x is not None and x.is_floating_point() for x in everything]):
                results, kept = forward(plan, *everything, keep=True)
            return [*results, *kept[:always_kept]]

        @op.register_fake
        def _(tensors, present, plan):
            results, kept = fake(plan, *_spread(tensors, present))
            return [*results, *kept]

        @torch.library.custom_op(f"hla::{name}_backward", mutates_args=())
        def op_backward(
            tensors: list[Tensor], present: list[bool], plan: str, saved: list[Tensor], grads: list[Tensor],
            given: list[bool], needed: list[bool],
        ) -> list[Tensor]:  # fmt: skip
            everything = _spread(tensors, present)
            with expecting(self, plan, everything, needed):
                found = backward(plan, everything, saved, _spread(grads, given), needed)
            return [x for x in found if x is not None]

        @op_backward.register_fake
        def _(tensors, present, plan, saved, grads, given, needed):
            everything = _spread(tensors, present)
            return [x.new_empty(x.shape) for x, need in zip(everything, needed, strict=True) if need]

        def setup(ctx, inputs, output) -> None:
            tensors, ctx.present, ctx.plan = inputs
            ctx.count, ctx.results = len(tensors), len(output)
            ctx.save_for_backward(*tensors, *output[first_saved(ctx.plan) :])
            ctx.set_materialize_grads(False)

        def gradient(ctx, grads):
            refuse_double_backward()
            if all(x is None for x in grads):
                return [None] * ctx.count, None, None
            tensors, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
            given = [x is not None for x in grads]
            needs = iter(ctx.needs_input_grad[0])
            needed = [present and next(needs) for present in ctx.present]
            found = iter(
                op_backward(tensors, ctx.present, ctx.plan, saved, [x for x in grads if x is not None], given, needed)
            )
            return [next(found) if need else None for need in ctx.needs_input_grad[0]], None, None

        op.register_autograd(gradient, setup_context=setup)
        self.op = op

    def __call__(self, plan: str, results: int, *tensors: Tensor | None) -> list[Tensor]:
        """``results``: how many there are."""
        if torch.compiler.is_compiling() or any(type(x) not in _PLAIN for x in tensors):
            present = [x is not None for x in tensors]
            return self.op([x for x in tensors if x is not None], present, plan)[:results]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return list(_Function.apply(self, plan, *tensors))
        with expecting(self, plan, tensors, None):
            return self.forward(plan, *tensors, keep=False)[0]


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operation: Operation, plan: str, *tensors):
        with expecting(operation, plan, tensors, ctx.needs_input_grad[2:]):
            results, kept = operation.forward(plan, *tensors, keep=True)
        ctx.operation, ctx.plan, ctx.count = operation, plan, len(tensors)
        ctx.save_for_backward(*tensors, *results[operation.first_saved(plan) :], *kept)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward()
        if all(x is None for x in grads):
            return (None,) * (2 + ctx.count)
        saved = ctx.saved_tensors
        tensors, saved = saved[: ctx.count], saved[ctx.count :]
        needed = ctx.needs_input_grad[2:]
        with expecting(ctx.operation, ctx.plan, tensors, needed):  # (forward, everything may have been there)
            return None, None, *ctx.operation.backward(ctx.plan, tensors, saved, grads, needed)


def refuse_double_backward() -> None:
    """With create_graph=True; the terms it would miss must not be missed silently."""
    if torch.is_grad_enabled():
        raise RuntimeError("double backward through HLA operators (create_graph=True) is not supported")


def _spread(tensors: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    """The tensors in their places, None elsewhere."""
    rest = iter(tensors)
    return [next(rest) if there else None for there in present]
