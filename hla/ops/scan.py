"""A work-efficient exclusive scan (Blelloch 1990) over any associative operation, with its reverse-mode adjoint.

For elements ``e_0 .. e_{n-1}`` and an associative ``combine`` with identity ``I``, the exclusive scan is

    P_t = I + e_0 + ... + e_{t-1}        ("+" is `combine`, which need not be commutative)

computed over a binary tree. The *up-sweep* gives every node the combination of the elements below it; the *down-sweep*
gives every node the combination of all elements before it: a left child's prefix is its parent's, a right child's is
its parent's combined with its left sibling. Each sweep is ``ceil(log2 n)`` calls of ``combine`` on stacked elements,
fewer than n combinations in all. Odd levels need no padding: a last node without a sibling moves up as it is.

**Adjoint** (Zhang et al. 2025, section 4.2, "Backward for gradients"). The steps are undone in reverse order, each
``combine`` replaced by its vector-Jacobian product at the forward states: the adjoint of the down-sweep walks up the
tree, that of the up-sweep walks down, again ``log2 n`` batched calls each. A gradient at ``P_t`` thereby reaches the
elements before t and no others: it is a scan from the end to the beginning.

**Checkpoints at tile boundaries.** Of a scan that autograd records, the nodes and prefixes of the whole tree are kept,
O(n) states with what ``combine`` keeps itself (the step-efficient scan of Hillis and Steele would keep O(n log n)).
With ``tile`` only the prefix that enters each tile is kept beside the elements, ``n / tile`` states. The adjoint goes
from the last tile to the first, builds the tree of one tile again from that prefix, and drops it: in all
``O(n / tile + tile)`` states beyond the elements, the result and their gradients.

Elements are trees: a tensor, or a tuple or NamedTuple of trees; every leaf has the n elements as leading axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")
Combine = Callable[[Any, Any], Any]


def exclusive_scan(
    elements: Tree, combine: Callable[[Tree, Tree], Tree], identity: Tree, tile: int | None = None
) -> Tree:
    """All exclusive prefixes ``P_t = identity + e_0 + ... + e_{t-1}``, as elements are stacked.

    Args:
        elements: a tree of floating-point tensors ``[n, ...]``, n >= 0.
        combine: associative, of two trees ``[m, ...]`` of stacked elements, row by row; shapes stay as they are.
        identity: a tree of one element, every leaf broadcastable to ``shape[1:]`` of the leaf of elements. Any other
            element works as well and is then the prefix that everything starts from.
        tile: elements per tile, or None. None is one tree over all elements, differentiated by autograd to any order.
            With a number, tiles go one after the other, only the prefix that enters each is kept for the backward pass,
            and gradients are of first order and reach elements and identity alone (a tensor that ``combine`` reads
            from elsewhere gets none).

    Returns:
        The prefixes, a tree like ``elements``. The combination of everything is that of the last prefix and element.

    Raises:
        ValueError: if leaves differ in their number of elements, identity is another tree, or ``tile < 1``.
    """
    n = _checked_count(elements, identity, tile)
    if n == 0:
        return elements
    start = _stacked(identity, elements)
    if tile is None:
        return down_sweep(up_sweep(elements, combine), combine, start)[0]
    structure = _map(lambda _: None, elements)
    flat = _TiledScan.apply(combine, tile, structure, *_leaves(elements), *_leaves(start))
    return _rebuild(structure, iter(flat))


def exclusive_scan_adjoint(
    elements: Tree,
    combine: Callable[[Tree, Tree], Tree],
    identity: Tree,
    grad_prefixes: Tree,
    tile: int | None = None,
) -> tuple[Tree, Tree]:
    """The gradients of elements and identity, given that of the prefixes: the adjoint of `exclusive_scan`.

    Arguments as there; ``tile=None`` is one tile. Recomputes what it needs of the forward pass. The gradient of the
    identity has the shape of the identity.
    """
    n = _checked_count(elements, identity, tile)
    if n == 0:
        return grad_prefixes, _map(torch.zeros_like, identity)
    start = _stacked(identity, elements)
    tile = tile or n
    carries = [start]
    for part in _tiles(elements, tile)[:-1]:
        carries.append(combine(carries[-1], up_sweep(part, combine)[-1]))
    grad_elements, grad_start = _scan_tiles_adjoint(elements, combine, carries, grad_prefixes, tile)
    return grad_elements, _map(lambda grad, x: grad.sum_to_size((1, *x.shape))[0], grad_start, identity)


# -- One tree ----------------------------------------------------------------------------------------------------------


def up_sweep(elements: Any, combine: Combine) -> list[Any]:
    """The levels of the tree from the elements to the root: ``nodes[i + 1][j] = nodes[i][2 j] + nodes[i][2 j + 1]``."""
    nodes = [elements]
    while _count(nodes[-1]) > 1:
        left, right = _children(nodes[-1])
        pairs = _count(right)
        joined = combine(_first(left, pairs), right)
        nodes.append(_map(_with_rest, joined, left))
    return nodes


def down_sweep(nodes: list[Any], combine: Combine, start: Any) -> list[Any]:
    """The prefix of every node, in the levels of ``nodes``; ``start [1, ...]`` is the prefix of the root."""
    prefixes = [start]
    for level in reversed(nodes[:-1]):
        left, right = _children(level)
        pairs = _count(right)
        of_left = prefixes[-1]
        of_right = combine(_first(of_left, pairs), _first(left, pairs))
        prefixes.append(_map(_interleave, of_left, of_right))
    return prefixes[::-1]


def sweeps_adjoint(
    nodes: list[Any], prefixes: list[Any], combine: Combine, grad_prefixes: Any, grad_root: Any
) -> tuple[Any, Any]:
    """The gradients of the elements and of ``start``, given those of the elements' prefixes and of the root node."""
    # The down-sweep's adjoint, from the elements up: what reaches a prefix goes on to its parent's, and through the
    # right child's `combine` to the left child's node.
    grad = grad_prefixes
    grads_of_left = []
    for level, parents in zip(nodes[:-1], prefixes[1:], strict=True):
        left, _ = _children(level)
        grad_left, grad_right = _children(grad)
        pairs = _count(grad_right)
        to_parents, to_left = combine_adjoint(combine, _first(parents, pairs), _first(left, pairs), grad_right)
        grad = _map(_add_to_first, grad_left, to_parents)
        grads_of_left.append(to_left)
    grad_start = grad

    # The up-sweep's adjoint, from the root down: what reaches a node goes on to its two children.
    grad = grad_root
    for level, to_left in zip(reversed(nodes[:-1]), reversed(grads_of_left), strict=True):
        left, right = _children(level)
        pairs = _count(right)
        grad_left, grad_right = combine_adjoint(combine, _first(left, pairs), right, _first(grad, pairs))
        grad_left = _map(_with_rest, _map(torch.add, grad_left, to_left), grad)
        grad = _map(_interleave, grad_left, grad_right)
    return grad, grad_start


def combine_adjoint(combine: Combine, a: Any, b: Any, grad: Any) -> tuple[Any, Any]:
    """The vector-Jacobian products of ``combine`` at ``(a, b)``: gradients of a and b, given that of the result."""
    with torch.enable_grad():
        a, b = (_map(lambda x: x.detach().requires_grad_(), x) for x in (a, b))
        pairs = [(x, g) for x, g in zip(_leaves(combine(a, b)), _leaves(grad), strict=True) if x.requires_grad]
    inputs = [*_leaves(a), *_leaves(b)]
    grads = iter(
        torch.autograd.grad([x for x, _ in pairs], inputs, [g for _, g in pairs], materialize_grads=True)
        if pairs
        else [torch.zeros_like(x) for x in inputs]
    )
    return _rebuild(a, grads), _rebuild(b, grads)


# -- Tiles -------------------------------------------------------------------------------------------------------------


def _scan_tiles(elements: Any, combine: Combine, start: Any, tile: int) -> tuple[Any, list[Any]]:
    """The prefixes of all elements, and the prefix ``[1, ...]`` that enters each tile."""
    parts = _tiles(elements, tile)
    prefixes, carries = [], [start]
    for part in parts:
        nodes = up_sweep(part, combine)
        prefixes.append(down_sweep(nodes, combine, carries[-1])[0])
        if len(carries) < len(parts):
            carries.append(combine(carries[-1], nodes[-1]))
    return _map(lambda *x: torch.cat(x), *prefixes), carries


def _scan_tiles_adjoint(
    elements: Any, combine: Combine, carries: list[Any], grad_prefixes: Any, tile: int
) -> tuple[Any, Any]:
    """The gradients of the elements and of the first carry, from the last tile to the first."""
    grad_carry = _map(torch.zeros_like, carries[0])
    grads = []
    tiles = zip(_tiles(elements, tile), _tiles(grad_prefixes, tile), carries, strict=True)
    for part, grad_part, carry in reversed(list(tiles)):
        nodes = up_sweep(part, combine)
        prefixes = down_sweep(nodes, combine, carry)
        to_carry, grad_root = combine_adjoint(combine, carry, nodes[-1], grad_carry)
        grad, grad_start = sweeps_adjoint(nodes, prefixes, combine, grad_part, grad_root)
        grad_carry = _map(torch.add, to_carry, grad_start)
        grads.append(grad)
    return _map(lambda *x: torch.cat(x), *reversed(grads)), grad_carry


class _TiledScan(torch.autograd.Function):
    """`_scan_tiles` and its adjoint on flat lists of leaves; keeps the elements and one carry per tile."""

    @staticmethod
    def forward(ctx: Any, combine: Combine, tile: int, structure: Any, *flat: Tensor) -> tuple[Tensor, ...]:
        leaves = iter(flat)
        elements, start = _rebuild(structure, leaves), _rebuild(structure, leaves)
        prefixes, carries = _scan_tiles(elements, combine, start, tile)
        ctx.combine, ctx.tile, ctx.structure = combine, tile, structure
        # The carries are tensors of their own, not slices of the prefixes, which would keep all prefixes alive.
        ctx.save_for_backward(*_leaves(elements), *(x for carry in carries for x in _leaves(carry)))
        return tuple(_leaves(prefixes))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        leaves = iter(ctx.saved_tensors)
        elements = _rebuild(ctx.structure, leaves)
        carries = [_rebuild(ctx.structure, leaves) for _ in _tiles(elements, ctx.tile)]
        grad_prefixes = _rebuild(ctx.structure, iter(grads))
        results = _scan_tiles_adjoint(elements, ctx.combine, carries, grad_prefixes, ctx.tile)
        return (None, None, None, *(x for result in results for x in _leaves(result)))


# -- Trees and their leading axis --------------------------------------------------------------------------------------


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` of corresponding leaves, in a tree like the first."""
    first = trees[0]
    if not isinstance(first, tuple):
        return function(*trees)
    parts = [_map(function, *x) for x in zip(*trees, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def _leaves(tree: Any) -> list[Any]:
    return [x for part in tree for x in _leaves(part)] if isinstance(tree, tuple) else [tree]


def _rebuild(structure: Any, leaves: Iterator[Tensor]) -> Any:
    """A tree like ``structure`` of the next leaves."""
    return _map(lambda _: next(leaves), structure)


def _count(tree: Any) -> int:
    return _leaves(tree)[0].shape[0]


def _first(tree: Any, count: int) -> Any:
    return _map(lambda x: x[:count], tree)


def _tiles(tree: Any, tile: int) -> list[Any]:
    return [_map(lambda x, a=a: x[a : a + tile], tree) for a in range(0, _count(tree), tile)]


def _children(level: Any) -> tuple[Any, Any]:
    """The left and the right children of a level: the last left one may lack a sibling."""
    return _map(lambda x: x[0::2], level), _map(lambda x: x[1::2], level)


def _with_rest(x: Tensor, longer: Tensor) -> Tensor:
    """``x``, followed by what ``longer`` has beyond it."""
    return torch.cat((x, longer[x.shape[0] :]))


def _add_to_first(x: Tensor, shorter: Tensor) -> Tensor:
    """``x``, with ``shorter`` added to its first elements."""
    return _with_rest(x[: shorter.shape[0]] + shorter, x)


def _interleave(left: Tensor, right: Tensor) -> Tensor:
    """``left_0, right_0, left_1, ...``; the last left one may lack a sibling."""
    paired = torch.stack((left[: right.shape[0]], right), 1).flatten(0, 1)
    return torch.cat((paired, left[right.shape[0] :]))


def _stacked(identity: Any, elements: Any) -> Any:
    """The identity as one stacked element ``[1, ...]``."""
    return _map(lambda x, e: x.expand(1, *e.shape[1:]), identity, elements)


def _checked_count(elements: Any, identity: Any, tile: int | None) -> int:
    counts = {x.shape[0] if x.dim() else -1 for x in _leaves(elements)}
    if len(counts) != 1 or -1 in counts:
        raise ValueError(
            "every leaf of elements needs the same number of elements as leading axis; got shapes "
            + ", ".join(str(tuple(x.shape)) for x in _leaves(elements))
        )
    if len(_leaves(identity)) != len(_leaves(elements)):
        raise ValueError(
            f"identity must be a tree like elements, of {len(_leaves(elements))} leaves; got {len(_leaves(identity))}"
        )
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be at least 1; got {tile}")
    return counts.pop()
