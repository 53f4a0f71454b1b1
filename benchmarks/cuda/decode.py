"""One token of an operator: `hla.step` in place on a float32 state, beside fla's and softmax attention on a cache.

"packed": S as the lower triangle of its tiles. "4 tokens": four in one call, whose microseconds the row has.

All of them captured in CUDA graphs of several calls, as a model that decodes captures its layers: the CPU's launches
do not count. Small states are as many as there are calls, so that they do not all stay in the L2 cache.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import hla
from benchmarks.cuda.guard import Budget, guarded
from benchmarks.cuda.probes import Ceilings, in_graph, kernels_launched
from benchmarks.measure import interleaved_medians
from hla.ops.state import packed_shape, zeros

CALLS = 8  # in one graph
APART = 1 << 30  # bytes of state up to which every call has its own


class Token(NamedTuple):
    """A function of one token, and the bytes of state it reads or, with ``written``, reads and writes."""

    make: Callable[[], Callable[[], object]]
    bytes: int
    written: bool


def tokens(
    batch: int, heads: int, dim: int, device: str, caches: list[int], with_fla: bool
) -> tuple[dict[str, Token], dict[str, str]]:
    """What decodes at a batch size, made when called (memory!), and what does not fit: name -> why."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16), dim=-1)

    q, k, v = (new(batch, heads, dim) for _ in range(3))
    four = (new(batch, 4, heads, dim), new(batch, 4, heads, dim), new(batch, 4, heads, dim))
    g = torch.full((batch, heads), -0.02, device=device)
    moment = 4 * batch * heads * dim * dim

    def step(op: str, packed: bool = False, inputs: tuple[Tensor, Tensor, Tensor] = (q, k, v), **kwargs: Any) -> Token:
        def make() -> Callable[[], object]:
            order = 4 if op == "hla_q" else None
            state: Any = zeros(op, batch, heads, heads, dim, dim, order=order, p_heads=heads, device=device)
            state = state.pack() if packed else state
            return lambda: hla.step(op, *inputs, state, out_state=state, **kwargs)

        size = moment * (1 if op == "linear_attn" else 2)
        if packed:
            size = moment + 4 * batch * heads * math.prod(packed_shape(dim))
        return Token(make, size, True)

    found = {
        "hla2": step("hla2"),
        "hla2, packed": step("hla2", packed=True),
        "hla2, 4 tokens": step("hla2", inputs=four),
        "hla2, packed, 4 tokens": step("hla2", packed=True, inputs=four),
        "linear_attn": step("linear_attn"),
        "hla_q default form": step("hla_q", g=g, ridge=1 - g),
        "hla_q default form, packed": step("hla_q", packed=True, g=g, ridge=1 - g),
    }
    missing: dict[str, str] = {}
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 2 << 30
    for length in caches:
        name, size = f"sdpa, cache of {length}", 2 * 2 * batch * heads * length * dim

        def attend(length: int = length) -> Callable[[], object]:
            keys, values = (
                torch.randn(batch, heads, length, dim, generator=generator, device=device, dtype=torch.bfloat16)
                for _ in range(2)
            )
            query = q[:, :, None]
            return lambda: F.scaled_dot_product_attention(query, keys, values)

        if size > 0.6 * memory:
            missing[name] = f"its cache of {size / 2**30:.0f} GiB does not fit"
        else:
            found[name] = Token(attend, size, False)
    if with_fla:
        try:
            recurrent = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
        except Exception as error:  # a peer that does not import must not end the run
            missing["fla recurrent"] = f"{type(error).__name__}: {error}"
        else:

            def readings(count: int) -> Callable[[], Callable[[], object]]:
                """Of first order, or of second order composed of it: ``k~`` takes the place of the keys."""

                def make() -> Callable[[], object]:
                    states = [torch.zeros(batch, heads, dim, dim, device=device) for _ in range(count)]
                    query, keys, values = (x[:, None] for x in (q, k, v))

                    def run() -> None:
                        x = keys
                        for i, state in enumerate(states):
                            y = values if i == count - 1 else keys
                            x, _ = recurrent(query, x, y, initial_state=state, output_final_state=True)

                    return run

                return make

            found["fla recurrent"] = Token(readings(1), moment, True)
            found["fla recurrent composed hla2"] = Token(readings(2), 2 * moment, True)
    return found, missing


@torch.inference_mode()
def measure(
    batch: int,
    heads: int,
    dim: int,
    device: str,
    seconds: float,
    ceilings: Ceilings,
    caches: list[int],
    with_fla: bool,
    budget: Budget,
) -> list[dict[str, Any]]:
    """Rows of one batch size: microseconds of one token of one layer."""
    found, errors = tokens(batch, heads, dim, device, caches, with_fla)
    replays: dict[str, Callable[[], object]] = {}
    kernels: dict[str, int | None] = {}

    def prepare(token: Token) -> tuple[int | None, Callable[[], object]]:
        functions = [token.make() for _ in range(CALLS if token.bytes * CALLS <= APART else 1)]
        return kernels_launched(functions[0], device), in_graph((functions * CALLS)[:CALLS], device)

    names = [*found, *errors]
    for name, token in found.items():
        result, error = guarded(prepare, token, budget=budget)
        if result is None:
            errors[name] = error
        else:
            kernels[name], replays[name] = result
    times = interleaved_medians(replays, device, seconds)
    rows = []
    for name in names:
        us = 1e3 * times[name] / CALLS if name in times else None
        floor = None
        if name in found:
            floor = 1e6 * (1 + found[name].written) * found[name].bytes / ceilings.bandwidth
        rows.append(
            {
                "operator": name,
                "B": batch,
                "H": heads,
                "D": dim,
                "dtype": "bfloat16",
                "us": "" if us is None else round(us, 2),
                "floor_us": "" if floor is None else round(floor, 2),
                "fraction_of_floor": "" if us is None or floor is None else round(floor / us, 3),
                "kernels": "" if kernels.get(name) is None else kernels[name],
                "calls_per_graph": CALLS,
                "error": errors.get(name, ""),
            }
        )
    return rows
