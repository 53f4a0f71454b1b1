"""States that stream: what an operator remembers of a sequence, as named tuples of tensors.

Shapes have a leading batch dimension B (or N, the number of packed sequences); HKV are the key/value heads, HP the
heads of the inner query p (HQ if p is "q", HKV if p is "k"). Everything is float32 (float64 for float64 inputs).
``m`` and ``n`` are the same moments for ``v = 1`` and exist only with ``normalize=True``. States hold no scale.

S is symmetric. ``state.pack()`` keeps only its lower triangle of 16 x 16 tiles (`pack_S`), ``[B, HKV, tiles, 16, 16]``
in the same named tuple, which `hla.step` reads and updates as it is; everything else wants ``state.unpack()``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from hla.ops.family import readings, transforms_keys


class LinearAttnState(NamedTuple):
    """``P [B, HKV, K, V] = sum k v^T``; ``m [B, HKV, K]``."""

    P: Tensor
    m: Tensor | None = None


class HLA2State(NamedTuple):
    """``S [B, HKV, K, K] = sum k k^T``, ``F [B, HP, K, V] = sum k~ v^T``; ``n [B, HP, K]``."""

    S: Tensor
    F: Tensor
    n: Tensor | None = None

    def pack(self) -> HLA2State:
        """With S packed; as it is if it was."""
        return _pack_state(self)

    def unpack(self) -> HLA2State:
        """With S whole; as it is if it was."""
        return _unpack_state(self)


class AHLAState(NamedTuple):
    """``P [B, HKV, K, V] = sum k v^T``, ``E [B, HP, K, V] = sum k v~^T``; ``m [B, HKV, K]``, ``n [B, HP, K]``."""

    P: Tensor
    E: Tensor
    m: Tensor | None = None
    n: Tensor | None = None


class AHLANState(NamedTuple):
    """ahla of an order other than 2: `AHLAState` with ``E [B, order - 1, HP, K, V]``, ``n [B, order - 1, HP, K]``."""

    P: Tensor
    E: Tensor
    m: Tensor | None = None
    n: Tensor | None = None


class HLA3State(NamedTuple):
    """``S [B, HKV, K, K]``, ``P [B, HKV, K, V]``, ``F [B, HP, K, V] = sum k~ v~^T``; ``m``, ``n`` as in `AHLAState`."""

    S: Tensor
    P: Tensor
    F: Tensor
    m: Tensor | None = None
    n: Tensor | None = None

    def pack(self) -> HLA3State:
        """With S packed; as it is if it was."""
        return _pack_state(self)

    def unpack(self) -> HLA3State:
        """With S whole; as it is if it was."""
        return _unpack_state(self)


class HLANState(NamedTuple):
    """``S`` (order > 1), ``P`` (odd order), ``F [B, order // 2, HP, K, V]``; ``m``, ``n [B, order // 2, HP, K]``."""

    S: Tensor | None
    P: Tensor | None
    F: Tensor
    m: Tensor | None = None
    n: Tensor | None = None

    def pack(self) -> HLANState:
        """With S packed; as it is if it was."""
        return _pack_state(self)

    def unpack(self) -> HLANState:
        """With S whole; as it is if it was."""
        return _unpack_state(self)


class HLAQState(NamedTuple):
    """``S [B, HKV, K, K] = sum k k^T``, ``P [B, HKV, K, V] = sum k v^T``, both with gate g."""

    S: Tensor
    P: Tensor

    def pack(self) -> HLAQState:
        """With S packed; as it is if it was."""
        return _pack_state(self)

    def unpack(self) -> HLAQState:
        """With S whole; as it is if it was."""
        return _unpack_state(self)


State = HLAQState | LinearAttnState | HLA2State | AHLAState | AHLANState | HLA3State | HLANState


TILE = 16
_Held = TypeVar("_Held", HLA2State, HLA3State, HLANState, HLAQState)


def pack_S(S: Tensor) -> Tensor:
    """The tiles ``[..., n (n + 1) / 2, 16, 16]`` of a symmetric ``S [..., K, K]``, with ``n = ceil(K / 16)``.

    Tile (i, j <= i) is number ``i (i + 1) / 2 + j`` and holds ``S[16 i : 16 i + 16, 16 j : 16 j + 16]``; beyond K there
    are zeros. For K = 128, 9216 numbers instead of 16384.
    """
    count = -(-S.shape[-1] // TILE)
    missing = count * TILE - S.shape[-1]
    whole = functional.pad(S, (0, missing, 0, missing))
    tiles = whole.unflatten(-2, (count, TILE)).unflatten(-1, (count, TILE)).transpose(-3, -2)
    i, j = torch.tril_indices(count, count, device=S.device)
    return tiles[..., i, j, :, :]


def packed_shape(K: int) -> tuple[int, int, int]:
    """Of one packed S."""
    count = -(-K // TILE)
    return count * (count + 1) // 2, TILE, TILE


def unpack_S(tiles: Tensor, K: int) -> Tensor:
    """The inverse of `pack_S`."""
    count = -(-K // TILE)
    i, j = torch.tril_indices(count, count, device=tiles.device)
    whole = tiles.new_empty(*tiles.shape[:-3], count, count, TILE, TILE)
    whole[..., j, i, :, :] = tiles.mT
    whole[..., i, j, :, :] = tiles
    return whole.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., :K, :K].contiguous()


def is_packed(state: object) -> bool:
    """Whether the S of a state is packed."""
    S = getattr(state, "S", None)
    return isinstance(S, Tensor) and S.dim() == 5


def _pack_state(state: _Held) -> _Held:
    S = state.S
    return state if S is None or is_packed(state) else state._replace(S=pack_S(S))


def _unpack_state(state: _Held) -> _Held:
    S = state.S
    if S is None or not is_packed(state):
        return state
    moment = state.P if isinstance(state, HLAQState) else state.F
    return state._replace(S=unpack_S(S, moment.shape[-2]))


def state_class(op: str, order: int | None = None) -> type:
    """The named tuple that holds the state of an operator."""
    if op == "ahla":
        return AHLAState if order == 2 else AHLANState
    classes = {"linear_attn": LinearAttnState, "hla2": HLA2State, "hla3": HLA3State, "hla_n": HLANState}
    return {**classes, "hla_q": HLAQState}[op]


def _stacked(op: str, order: int | None) -> str | None:
    """The field that stacks several moments along dimension 1, if any."""
    return "F" if op == "hla_n" else "E" if op == "ahla" and order != 2 else None


def _moment_fields(op: str, order: int | None) -> tuple[list[str], list[str]]:
    """Names of the fields that hold one moment each, in the order of the readings; and those of their v = 1 twins."""
    if op == "hla2":
        return ["F"], ["n"]
    if op == "hla_q":
        return ["P"], []
    if op == "hla_n":
        return (["P"], ["m"]) if order is not None and order % 2 else ([], [])
    later = {"linear_attn": [], "ahla": ["E"] if order == 2 else [], "hla3": ["F"]}[op]
    return ["P", *later], ["m", *(["n"] if later else [])]


def pack(op: str, order: int | None, S: Tensor | None, moments: list[Tensor], ones: list[Tensor] | None) -> State:
    """The state of an operator from S, one moment per reading, and the moments for v = 1 (``[B, H, K]`` each)."""
    names, ones_names = _moment_fields(op, order)
    fields: dict[str, Tensor | None] = dict(zip(names, moments, strict=False))
    if ones is not None:
        fields |= dict(zip(ones_names, ones, strict=False))
    if field := _stacked(op, order):
        like = moments[0]
        for name, parts, shape in ((field, moments, like.shape), ("n", ones, like.shape[:-1])):
            if parts is not None:
                rest = parts[len(names) :]
                fields[name] = torch.stack(rest, 1) if rest else like.new_zeros(shape[0], 0, *shape[1:])
    cls: Any = state_class(op, order)
    if "S" in cls._fields:
        fields["S"] = S
    if op == "hla_n":
        fields.setdefault("P", None)
    return cls(**fields)


def unpack(op: str, order: int | None, state: State) -> tuple[Tensor | None, list[Tensor], list[Tensor] | None]:
    """The inverse of `pack`."""
    names, ones_names = _moment_fields(op, order)
    moments = [getattr(state, name) for name in names]
    ones = [getattr(state, name) for name in ones_names]
    if field := _stacked(op, order):
        moments += getattr(state, field).unbind(1)
        if (n := getattr(state, "n", None)) is not None:
            ones += n.unbind(1)
    has_ones = any(x is not None for name, x in zip(state._fields, state, strict=True) if name in ("m", "n"))
    return getattr(state, "S", None), moments, ones if has_ones else None


def zeros(
    op: str,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    K: int,
    V: int,
    *,
    order: int | None = None,
    p_heads: int | None = None,
    normalize: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """The empty state of an operator, what ``state=None`` means.

    Args:
        batch: B, the number of packed sequences, or the number of slots of an engine. num_heads: HQ; num_kv_heads: HKV.
        p_heads: heads of the inner query: HQ (default) for ``p="q"``, HKV for ``p="k"``.
    """
    order = 2 if op == "ahla" and order is None else order
    hp = num_heads if p_heads is None else p_heads
    new = lambda *shape: torch.zeros(batch, *shape, dtype=dtype, device=device)  # noqa: E731
    heads = [num_kv_heads] + [hp] * (len(readings(op, order)) - 1)
    if readings(op, order)[0].keys == "k~":
        heads[0] = hp
    S = new(num_kv_heads, K, K) if transforms_keys(op, order) or op == "hla_q" else None
    ones = [new(h, K) for h in heads] if normalize else None
    return pack(op, order, S, [new(h, K, V) for h in heads], ones)


def state_nbytes(state: State) -> int:
    """Bytes held by a state."""
    return sum(x.numel() * x.element_size() for x in state if x is not None)
