"""The table of configurations: block sizes, warps and pipeline depth, by head size, dtype and device.

A fixed table instead of autotuning. Whole sequences, split ones and packed ones are three variants of a kernel, each
compiled when first met; beyond that no length, batch or packing compiles or tunes again.
`tests/kernels/test_offline.py` compiles rows for several cards without a GPU and asserts spills and shared memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from hla.kernels.ahead import real


class Config(NamedTuple):
    """Rows of a chunk, columns of the state a program owns, warps, and stages of the load pipeline."""

    chunk: int
    columns: int
    warps: int
    stages: int


@functools.cache
def block(size: int) -> int:
    """The block that holds a head size: a power of two, at least 16 (the smallest operand of the matrix units)."""
    return max(16, 1 << (size - 1).bit_length())


@functools.cache
def walk_config(
    key: int, value: int, dtype: str, gated: bool, exact: bool, capability: tuple[int, int], both: bool = False
) -> Config:
    """For `linear_attn.walk`.

    Args:
        key, value: head sizes. dtype: "bf16", "tf32" (float16 inputs) or "float32": operands of the matrix units.
        exact: with what rounding left over (see `linear_attn.walk`). both: with two queries, if that many columns fit.
    """
    key, size = block(key), max(64, block(key))
    if dtype == "tf32":
        row = Config(32, 32, 4, 1)
    elif dtype == "float32":
        row = Config(16, 32, 4 if size == 64 else 8, 1)
    elif little_memory(capability):
        row = {64: Config(64, 32, 4, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 32, 8, 1)}[size]
    elif capability < (9, 0):
        row = {64: Config(32, 64, 4, 3), 128: Config(32, 32, 4, 2), 256: Config(32, 32, 8, 2)}[size]
    elif both and size == 128:
        row = Config(32, 128, 8, 3)
    elif exact:
        row = {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(32, 32, 8, 3)}[size]
    else:
        row = {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2 if gated else 3), 256: Config(64, 64, 8, 2)}[size]
    return row._replace(columns=min(row.columns, block(value)))


class QuerySideConfig(NamedTuple):
    """For the kernels of `query_side` and `pairs`: rows of a chunk, warps of the kernels that own a chunk, whether
    `adjoint` loads ahead, stages of the load pipelines, and how many registers a thread of `solve` and `pair_gradients`
    may have."""

    chunk: int = 64
    warps: int = 4
    adjoint_ahead: int = 1
    states_stages: int = 3
    moments_stages: int = 4
    fold_stages: int = 2
    registers: int | None = None


@functools.cache
def query_side_config(key: int, wide: bool, capability: tuple[int, int]) -> QuerySideConfig:
    """For the kernels of `query_side`."""
    if wide:
        warps = 8 if key > 64 else 4
        return QuerySideConfig(32, warps, adjoint_ahead=0, states_stages=1, moments_stages=1, fold_stages=1)
    if little_memory(capability):
        return QuerySideConfig(chunk=32, states_stages=2, moments_stages=2, fold_stages=1)
    if capability < (9, 0):
        return QuerySideConfig(warps=8 if key > 64 else 4)
    three = (
        key <= 64 and capability[0] == 9 and torch.version.hip is None
    )  # programs on a multiprocessor, instead of two
    return QuerySideConfig(registers=168 if three else None)


def little_memory(capability: tuple[int, int]) -> bool:
    """Cards with about 99 KB of shared memory per block: consumer ones, and their professional twins."""
    return (capability[0] == 8 and capability[1] != 0) or capability[0] == 12


@functools.cache
def has_gluon(capability: tuple[int, int]) -> bool:
    """Whether a device takes the kernels written in Gluon: a dialect for Hopper GPUs that changes between versions of
    Triton, so only those for which they have been compiled."""
    import triton

    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    fits = capability == (9, 0) and torch.version.hip is None and (3, 6) <= version <= (3, 9)
    return fits and not triton.knobs.runtime.interpret


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it ends (programmatic dependent launch, see `launch`)."""
    return device_config(device)[0] >= (9, 0) and torch.version.hip is None


def device_config(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; those of an H100 where there is no card (interpreter)."""
    return _device_config(real(device))


@functools.cache
def _device_config(device: torch.device) -> tuple[tuple[int, int], int]:
    if device.type != "cuda":
        return (9, 0), 132
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
