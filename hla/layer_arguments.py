"""What the layer's arguments may be: names of choices, and checks whose messages name the argument."""

from __future__ import annotations

import math
from typing import Any

OPS = ("linear_attn", "hla2", "ahla", "hla3", "hla_q")
FEATURE_MAPS = ("identity", "silu", "relu", "elu1")
INNER_QUERIES = ("q", "k", "proj")
DECAYS = ("none", "fixed", "token")
QK_NORMS = ("l2", "rms", "none")
NODES = ("chebyshev", "head", "token")
LEARNED = ("head", "token", "delta")
MAX_ORDER = 16


def coefficient_names(op: str) -> tuple[str, ...]:
    """The coefficients an operator reads."""
    others = {"linear_attn": (), "hla_q": ("ridge",), "hla3": ("ridge", "gain", "value_ridge", "value_gain")}
    return others.get(op, ("ridge", "gain"))


def default_coefficient(op: str) -> str:
    """What a coefficient of None stands for: the form that learned best (docs/evidence.md)."""
    return "token" if op == "hla_q" else "delta"


def check_arguments(
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    head_v_dim: int | None,
    op: str,
    order: int,
    nodes: str,
    write_gate: bool | None,
    p: str,
    ridge: float | str | None,
    gain: float | str | None,
    value_ridge: float | str | None,
    value_gain: float | str | None,
    decay: str,
    conv_size: int,
    rope_theta: float | None,
    feature_map: str,
    qk_norm: str,
    scale: float | None,
    normalize: bool,
    output_norm: bool,
    output_gate: bool,
    bias: bool,
    norm_eps: float,
) -> None:
    """Checks the arguments of `HigherOrderLinearAttention`; raises a ValueError or TypeError that names the bad one."""
    _check_int("hidden_size", hidden_size, 1)
    _check_int("num_heads", num_heads, 1)
    if num_kv_heads is not None:
        _check_int("num_kv_heads", num_kv_heads, 1)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    if head_dim is None:
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads}) without head_dim"
            )
        head_dim = hidden_size // num_heads
    _check_int("head_dim", head_dim, 1, 256)
    if head_v_dim is not None:
        _check_int("head_v_dim", head_v_dim, 1, 256)
    _check_choice("op", op, OPS)
    _check_int("order", order, 1, MAX_ORDER)
    _check_choice("nodes", nodes, NODES)
    if write_gate is not None and not isinstance(write_gate, bool):
        raise TypeError(f"write_gate must be True, False or None, got {write_gate!r}")
    _check_choice("p", p, INNER_QUERIES)
    _check_choice("decay", decay, DECAYS)
    _check_choice("feature_map", feature_map, FEATURE_MAPS)
    _check_choice("qk_norm", qk_norm, QK_NORMS)
    _check_int("conv_size", conv_size, 0, 16)
    flags = {"normalize": normalize, "output_norm": output_norm, "output_gate": output_gate, "bias": bias}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    _check_positive("norm_eps", norm_eps)
    if scale is not None:
        _check_positive("scale", scale)
    if rope_theta is not None:
        _check_positive("rope_theta", rope_theta)
        if head_dim % 2:
            raise ValueError(f"rope_theta needs an even head_dim, got head_dim {head_dim}")

    if op == "hla_q" and normalize:
        raise ValueError("hla_q is a least-squares read-out and has no normalised form: normalize must be False")

    coefficients = {"ridge": ridge, "gain": gain, "value_ridge": value_ridge, "value_gain": value_gain}
    for name, value in coefficients.items():
        if value is None:
            coefficients[name] = default_coefficient(op)
        elif isinstance(value, str):
            _check_choice(name, value, LEARNED, "a number or ")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or one of {LEARNED}, got {value!r}")
        elif not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if op == "hla_q":
        if ridge == "delta":
            raise ValueError('ridge = "delta" decorrelates keys; hla_q takes a positive number, "head" or "token"')
        if isinstance(ridge, int | float) and ridge <= 0:
            raise ValueError(f"ridge of hla_q must be positive, got {ridge}")
    read = coefficient_names(op)
    for first, second in (("ridge", "gain"), ("value_ridge", "value_gain")):
        if first not in read or second not in read:
            continue
        deltas = [name for name in (first, second) if coefficients[name] == "delta"]
        if len(deltas) == 1:
            raise ValueError(f'{first} and {second} must both be "delta" or neither, but only {deltas[0]} is')
        if deltas and p != "k":
            raise ValueError(f'{first} = {second} = "delta" needs p = "k", got p = {p!r}')


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...], also: str = "") -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {also}one of {choices}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be {also}one of {choices}, got {value!r}")
