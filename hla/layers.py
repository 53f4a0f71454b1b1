"""The mixer: higher-order linear attention as a drop-in replacement for a softmax attention sublayer.

One fused projection gives q, k, v (and an own inner query p), a short causal depthwise convolution looks a few tokens
back, feature map and normalisation make the affinities well scaled, the operator mixes the sequence, and each head's
output is normalised, gated and projected back. Everything is linear in the sequence length, and decoding needs a state
of constant size (`LayerState`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hla.convolution import positions_in_packed, short_convolution
from hla.joined import has_kernels
from hla.layer_arguments import check_arguments, coefficient_names, default_coefficient
from hla.layer_state import LayerState, copy_state, map_state
from hla.norm import RMSNorm
from hla.ops.checks import HAS_TRITON, chebyshev_nodes, check_backend
from hla.ops.higher_order import ahla, hla2, hla3, hla_q, linear_attn
from hla.ops.recurrent import step
from hla.ops.state import zeros
from hla.projection import project
from hla.rotary import apply_rope, rope_cos_sin

if TYPE_CHECKING:
    from hla.distributed import SequenceParallel

OPERATORS: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "linear_attn": linear_attn,
    "hla2": hla2,
    "ahla": ahla,
    "hla3": hla3,
    "hla_q": hla_q,
}
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    "elu1": lambda x: F.elu(x) + 1,
}
# Learned coefficients start close to first-order attention (ridge 1, a small gain): started larger, training stalls.
B_START = math.exp(-3.0)
# Small taps (q, k and the output are normalised anyway) learn text faster than the usual uniform ones, by 0.02 to 0.04
# bits per byte over the first few hundred steps, and far faster than taps near the identity.
CONV_START_STD = 0.02
START = {"ridge": 1.0, "gain": B_START, "value_ridge": 1.0, "value_gain": B_START}


class HigherOrderLinearAttention(nn.Module):
    """Causal token mixer with the shapes of a softmax attention sublayer: ``[B, T, hidden_size]`` in and out.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key / value heads, a divisor of num_heads; None means num_heads.
        head_dim: width of q and k per head, at most 256; None means ``hidden_size // num_heads``.
        head_v_dim: width of v per head, at most 256; None means head_dim.
        op: ``"hla_q"``, ``"linear_attn"``, ``"hla2"``, ``"ahla"`` or ``"hla3"``. What an operator does not have it
            ignores: ``hla_q`` and ``linear_attn`` have no inner query and no gain, ``linear_attn`` no ridge, and only
            ``hla3`` has value_ridge and value_gain.
        order: of hla_q: how often it reads the key moment (1 to 16).
        nodes: of hla_q: ``"chebyshev"``, constants; ``"head"``, learned per head (starting there); or ``"token"``,
            ``sigmoid(learned per head + learned per token)``.
        write_gate: weigh what each token adds to the moments by ``b = sigmoid(W x)`` per key head (k and v are
            multiplied by ``sqrt(b)``); None means True for hla_q and False for the others.
        p: inner query: ``"q"``, ``"k"`` or ``"proj"``, an own projection (one per key head).
        ridge, gain, value_ridge, value_gain: each a constant; ``"head"``, learned per head; ``"token"``, learned per
            head times ``2 sigmoid(learned per token)`` (the positive ridge of hla_q: ``exp(learned per head + learned
            per token)``); None, which is "token" for hla_q and "delta" for the others; or ``"delta"``: with
            ``b = exp(learned per head, start -3) * sigmoid(per token)``, ``gain = -b / scale`` and
            ``ridge = 1 + b |k|^2``, so that every key is decorrelated from earlier keys
            (``k~_j = k_j - b_j S_{j-1} k_j``) and every value corrected by what its key already reads
            (``v~_j = v_j - b_j P_{j-1}^T k_j``). "delta" needs p = "k" and goes to both of a pair or to neither.
        decay: ``"none"``; ``"fixed"``, RetNet's constants ``log(1 - 2^(-5-h))`` per key head; or ``"token"``:
            ``g = -exp(A_log) * softplus(W x + dt_bias)`` per token and key head, in float32.
        conv_size: taps of the short convolution (1 to 16); 0 leaves it out.
        rope_theta: base of rotary position embeddings of q, k and p; None leaves them out.
        feature_map: of q, k and p: ``"silu"``, ``"relu"``, ``"elu1"`` (elu + 1) or ``"identity"``.
        qk_norm: of q, k and p per head: ``"l2"``, ``"rms"`` or ``"none"``.
        scale: of every affinity; None means ``head_dim ** -0.5``, and 1 for hla_q.
        normalize: divide by the operator applied to ones.
        output_norm: RMS norm of each head's output.
        output_gate: multiply by silu of a projection of the input.
        bias: of the input, gate and output projections.
        norm_eps: of all normalisations.
        backend: of the operator; None chooses by device.

    Attributes:
        sequence_parallel: set it to a `hla.distributed.SequenceParallel`, and the layer takes one piece of the sequence
            on each rank: hidden_states, attention_mask and position_ids of this rank's tokens, cu_seqlens and state of
            the whole sequence. The state returned is the one after the whole sequence, on every rank.

    The published operator is ``HigherOrderLinearAttention(..., op="hla2", p="q", ridge=0, gain=1, decay="none")``.

    Raises:
        ValueError, TypeError: naming the argument, see `check_arguments`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        head_v_dim: int | None = None,
        op: str = "hla_q",
        order: int = 4,
        nodes: str = "head",
        write_gate: bool | None = None,
        p: str = "k",
        ridge: float | str | None = None,
        gain: float | str | None = None,
        value_ridge: float | str | None = None,
        value_gain: float | str | None = None,
        decay: str = "token",
        conv_size: int = 4,
        rope_theta: float | None = None,
        feature_map: str = "silu",
        qk_norm: str = "l2",
        scale: float | None = None,
        normalize: bool = False,
        output_norm: bool = True,
        output_gate: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-6,
        backend: str | None = None,
    ):
        super().__init__()
        self.sequence_parallel: SequenceParallel | None = None
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__", "backend")}
        check_arguments(**arguments)
        check_backend(backend)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.head_v_dim = self.head_dim if head_v_dim is None else head_v_dim
        self.op, self.order, self.nodes, self.decay = op, order, nodes if op == "hla_q" else None, decay
        self.p = p if op not in ("linear_attn", "hla_q") else None
        self.write_gate = op == "hla_q" if write_gate is None else write_gate
        given = {name: arguments[name] for name in coefficient_names(op)}
        self.coefficients = {name: default_coefficient(op) if x is None else x for name, x in given.items()}
        self.conv_size, self.rope_theta = conv_size, rope_theta
        self.feature_map, self.qk_norm = feature_map, qk_norm
        # What least squares reads has the size of v; a sum of products wants to be scaled.
        self.scale = float(scale or (1.0 if op == "hla_q" else self.head_dim**-0.5))
        self.normalize, self.norm_eps, self.backend = normalize, norm_eps, backend

        # Columns of the fused projection: q, k, v and, if it has a projection of its own, p.
        q_size, k_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.split_sizes = [q_size, k_size, self.num_kv_heads * self.head_v_dim]
        if self.p == "proj":
            self.split_sizes.append(k_size)
        self.channels = sum(self.split_sizes)
        self.qkv_proj = nn.Linear(hidden_size, self.channels, bias=bias)
        if conv_size:
            self.conv_weight = nn.Parameter(torch.empty(self.channels, conv_size))

        p_heads = self.num_kv_heads if self.p in ("k", "proj") else self.num_heads
        for name, value in self.coefficients.items():
            if value in ("head", "token"):
                self.register_parameter(f"{name}_head", nn.Parameter(torch.empty(p_heads)))
            if value == "token":
                self.add_module(f"{name}_proj", nn.Linear(hidden_size, p_heads, bias=False))
        if "delta" in self.coefficients.values():
            self.log_b = nn.Parameter(torch.empty(p_heads))
            self.b_proj = nn.Linear(hidden_size, p_heads, bias=False)
        if self.nodes in ("head", "token"):
            self.node_logits = nn.Parameter(torch.empty(self.num_heads, order + 1))
        if self.nodes == "token":
            self.node_proj = nn.Linear(hidden_size, self.num_heads, bias=False)
        if self.write_gate:
            self.write_proj = nn.Linear(hidden_size, self.num_kv_heads, bias=False)
        if decay == "token":
            self.A_log = nn.Parameter(torch.empty(self.num_kv_heads))
            self.dt_bias = nn.Parameter(torch.empty(self.num_kv_heads))
            self.decay_proj = nn.Linear(hidden_size, self.num_kv_heads, bias=False)

        output_size = self.num_heads * self.head_v_dim
        self.o_norm = RMSNorm(self.head_v_dim, eps=norm_eps) if output_norm else None
        self.gate_proj = nn.Linear(hidden_size, output_size, bias=bias) if output_gate else None
        self.o_proj = nn.Linear(output_size, hidden_size, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts the parameters that belong to the layer itself (not to its linear maps and norms) anew."""
        for parameter, value in self.start_values():
            parameter.copy_(value)

    def start_values(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The layer's own parameters with their (partly random) values at the start of training."""
        heads = torch.ones(self.num_kv_heads)
        if self.conv_size:
            yield self.conv_weight, CONV_START_STD * torch.randn(self.channels, self.conv_size)
        for name, value in self.coefficients.items():
            if value in ("head", "token"):
                parameter = self.get_parameter(f"{name}_head")
                # hla_q's ridge is the exponential of its parameter.
                yield parameter, torch.full(parameter.shape, 0.0 if self.op == "hla_q" else START[name])
        if "delta" in self.coefficients.values():
            yield self.log_b, torch.full(self.log_b.shape, math.log(B_START))
        if self.nodes in ("head", "token"):
            yield self.node_logits, torch.logit(chebyshev_nodes(self.order)).expand(self.num_heads, -1)
        if self.decay == "token":
            # Step sizes dt spread log-uniformly over [0.001, 0.1] and rates over [1, 16], as in Mamba-2.
            yield self.A_log, (1 + 15 * torch.rand_like(heads)).log()
            dt = torch.exp(math.log(1e-3) + math.log(1e2) * torch.rand_like(heads))
            yield self.dt_bias, dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: LayerState | None = None,
        output_state: bool = False,
        out_state: LayerState | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Mixes the tokens of each sequence causally.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: ``[B, T]``, nonzero at tokens and 0 at pads; a pad changes nothing for any token.
                With a state to be continued, pads belong to the left.
            position_ids: int ``[B, T]`` or ``[1, T]``, for RoPE; by default tokens are counted, pads not, from
                ``state.position`` and within each packed sequence.
            cu_seqlens: int ``[N + 1]``, borders of N packed sequences; needs B = 1.
            state: from an earlier call, to continue it.
            output_state: return the state after the last token.
            out_state: write that state into these tensors (which may be those of ``state``), without gradient.

        Returns:
            ``[B, T, hidden_size]`` and the state, or None unless it was asked for.

        Raises:
            ValueError, TypeError: for inputs of the wrong shape or kind, naming the argument.
        """
        self._check_inputs(hidden_states, attention_mask, position_ids, cu_seqlens)
        sequences = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        self._check_state("state", state, sequences)
        self._check_state("out_state", out_state, sequences)
        wants_state = output_state or out_state is not None
        if state is not None and state is out_state and attention_mask is None and cu_seqlens is None:
            if hidden_states.is_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
                from hla.one_token import fits, token

                if fits(self, hidden_states, state):
                    return token(self, hidden_states, state), out_state
        mask = None if attention_mask is None else (attention_mask != 0)[..., None]
        position = None
        if self.rope_theta is not None:
            position_ids, position = self._positions(hidden_states, attention_mask, position_ids, cu_seqlens, state)

        history = None if state is None else state.conv
        gate = None
        if self._in_one_launch(hidden_states, cu_seqlens):
            from hla.kernels.shape import project as project_in_one_launch

            q, k, v, conv, options = project_in_one_launch(self, hidden_states, mask, history, wants_state)
        elif self._shapes_in_kernels(hidden_states, cu_seqlens, history, wants_state):
            from hla.kernels.shape_training import project as project_in_kernels

            q, k, v, conv, options, gate = project_in_kernels(
                self, hidden_states, mask, cu_seqlens, history, wants_state
            )
        else:
            q, k, v, p, conv = self._project(hidden_states, mask, position_ids, cu_seqlens, history, wants_state)
            options = {"g": self._log_decay(hidden_states, mask), **self._coefficients(hidden_states, k)}
            if p is not None:
                options["p"] = p
        if self.sequence_parallel is None:
            o, op = self._operate(q, k, v, options, state, wants_state, out_state, cu_seqlens)
        else:
            pending = self.sequence_parallel.begin(
                self.op, q, k, v, initial_state=self._operator_state(state, out_state), output_final_state=wants_state,
                cu_seqlens=cu_seqlens, backend=self.backend, **self._operator_options(options),
            )  # fmt: skip
            gate = self._gate_logits(hidden_states)  # computed while the summaries travel
            o, op = pending.finish()

        gate = self._gate_logits(hidden_states) if gate is None else gate
        if isinstance(self.o_norm, RMSNorm) and self._has_kernels(o) and self.o_norm.is_bare():
            from hla.kernels.gates import gated_norm

            o = gated_norm(self.o_norm, o, gate)
        else:
            o = (o if self.o_norm is None else self.o_norm(o)).flatten(2)
            o = o if gate is None else o * F.silu(gate[..., : o.shape[-1]])
        y = project(self.o_proj, o)
        if not wants_state:
            return y, None
        new_state = LayerState(conv, op, position)
        if out_state is None:
            return y, new_state
        copy_state(out_state, new_state)
        return y, out_state

    def _project(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        history: Tensor | None,
        wants_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | str | None, Tensor | None]:
        """q, k, v ``[B, T, heads, dim]`` and p as the operator takes them, 0 at pads, and the convolution's state."""
        x = project(self.qkv_proj, hidden_states)
        if mask is not None:
            x = x * mask  # what the convolution sees at pads
        conv = None
        if self.conv_size:
            parallel = self.sequence_parallel
            convolution = short_convolution if parallel is None else parallel.short_convolution
            x, conv = convolution(x, self.conv_weight, cu_seqlens, history, wants_state)
        dims = [self.head_dim, self.head_dim, self.head_v_dim, self.head_dim][: len(self.split_sizes)]
        parts = x.split(self.split_sizes, -1)
        q, k, v, *own = (part.unflatten(-1, (-1, dim)) for part, dim in zip(parts, dims, strict=True))
        shaped = [self._normalised(FEATURE_MAPS[self.feature_map](part)) for part in (q, k, *own)]
        if self.rope_theta is not None:
            assert position_ids is not None
            cos_sin = rope_cos_sin(position_ids, self.head_dim, self.rope_theta, x.dtype)
            shaped = [apply_rope(part, *cos_sin) for part in shaped]
        if mask is not None:  # again: the convolution and elu1 put something there
            shaped = [part * mask[..., None] for part in shaped]
            v = v * mask[..., None]
        q, k, *own = shaped
        if self.write_gate:
            share = torch.sigmoid(_wide(self.write_proj(hidden_states)))[..., None].sqrt()
            k, v = (part * share.to(part.dtype) for part in (k, v))
        return q, k, v, own[0] if own else self.p, conv

    def _in_one_launch(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether a kernel does what lies between the projections and the operator (it has no gradient)."""
        if not (hidden_states.is_cuda and HAS_TRITON) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if cu_seqlens is not None or self.sequence_parallel is not None or hidden_states.dtype == torch.float64:
            return False
        from hla.kernels.shape import supports

        return hidden_states.numel() > 0 and not torch.is_autocast_enabled("cuda") and supports(self)

    def _has_kernels(self, x: Tensor) -> bool:
        """Whether the Triton kernels around the operator take a tensor."""
        return has_kernels(x) and x.numel() > 0 and self.backend != "torch"

    def _shapes_in_kernels(
        self, x: Tensor, cu_seqlens: Tensor | None, history: Tensor | None, wants_state: bool
    ) -> bool:
        """Whether kernels with a gradient do what lies between the projections and the operator."""
        continued = history is not None or wants_state or self.sequence_parallel is not None
        if self.rope_theta is not None or len(self.split_sizes) != 3 or (continued and cu_seqlens is not None):
            return False
        return self._has_kernels(x) and self.has_own("_project")

    def has_own(self, *methods: str) -> bool:
        """Whether no subclass has replaced these methods, whose work kernels do."""
        return all(getattr(type(self), name) is getattr(HigherOrderLinearAttention, name) for name in methods)

    def _operate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: dict[str, Any],
        state: LayerState | None,
        wants_state: bool,
        out_state: LayerState | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """The operator's output ``[B, T, heads, head_v_dim]`` and state: one step for one token, else in chunks."""
        options = self._operator_options(options)
        op_state = self._operator_state(state, out_state)
        in_place = out_state is not None and not torch.is_grad_enabled()
        if q.shape[1] == 1 and state is not None and cu_seqlens is None:
            # (nodes per head have no dimension of time)
            options = {n: x[:, 0] if isinstance(x, Tensor) and x.dim() > 2 else x for n, x in options.items()}
            target = out_state.op if out_state is not None and in_place else None
            o, op = step(self.op, q[:, 0], k[:, 0], v[:, 0], op_state, out_state=target, **options)
            return o[:, None], op
        return OPERATORS[self.op](
            q,
            k,
            v,
            initial_state=op_state,
            output_final_state=wants_state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            **options,
        )

    def _operator_options(self, options: dict[str, Any]) -> dict[str, Any]:
        shape = {"order": self.order} if self.op == "hla_q" else {"normalize": self.normalize}
        return {**options, "scale": self.scale, **shape}

    def _operator_state(self, state: LayerState | None, out_state: LayerState | None) -> Any:
        if state is not None and out_state is not None and torch.is_grad_enabled():
            # The backward pass reads it, and out_state may be the same tensors.
            return map_state(Tensor.clone, state.op)
        return None if state is None else state.op

    def _gate_logits(self, hidden_states: Tensor) -> Tensor | None:
        return None if self.gate_proj is None else project(self.gate_proj, hidden_states)

    def zero_state(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> LayerState:
        """The state before the first token of ``batch_size`` sequences, for a layer computing in ``dtype``."""
        dtype = torch.promote_types(dtype, torch.float32)
        op = zeros(
            self.op,
            batch_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_v_dim,
            order=self.order if self.op == "hla_q" else None,
            p_heads=self.num_kv_heads if self.p in ("k", "proj") else self.num_heads,
            normalize=self.normalize,
            dtype=dtype,
            device=device,
        )
        conv = position = None
        if self.conv_size:
            conv = torch.zeros(batch_size, self.channels, self.conv_size - 1, dtype=dtype, device=device)
        if self.rope_theta is not None:
            position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return LayerState(conv, op, position)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.qk_norm == "none":
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square()
        square = square.sum(-1, keepdim=True) if self.qk_norm == "l2" else square.mean(-1, keepdim=True)
        return (wide * torch.rsqrt(square + self.norm_eps)).to(x.dtype)

    def _coefficients(self, hidden_states: Tensor, k: Tensor) -> dict[str, Any]:
        """ridge, gain, value_ridge, value_gain: constants or ``[B, T, heads of p]`` in float32; nodes of hla_q."""
        if self.op == "hla_q":
            return {"ridge": self._positive_ridge(hidden_states), "nodes": self._nodes(hidden_states)}
        values: dict[str, Any] = {}
        b = None
        if "delta" in self.coefficients.values():
            b = _wide(self.log_b).exp() * torch.sigmoid(_wide(self.b_proj(hidden_states)))
        for name, kind in self.coefficients.items():
            if kind == "delta":
                assert b is not None
                values[name] = -b / self.scale if "gain" in name else 1 + b * _wide(k).square().sum(-1)
            elif kind == "head":
                values[name] = _wide(self.get_parameter(f"{name}_head")).expand(*hidden_states.shape[:2], -1)
            elif kind == "token":
                logits = self.get_submodule(f"{name}_proj")(hidden_states)
                values[name] = 2 * _wide(self.get_parameter(f"{name}_head")) * torch.sigmoid(_wide(logits))
            else:
                values[name] = float(kind)
        return values

    def _positive_ridge(self, hidden_states: Tensor) -> float | Tensor:
        kind = self.coefficients["ridge"]
        if kind not in ("head", "token"):
            return float(kind)
        logarithm = _wide(self.get_parameter("ridge_head")).expand(*hidden_states.shape[:2], -1)
        if kind == "token":
            logarithm = logarithm + _wide(self.get_submodule("ridge_proj")(hidden_states))
        return logarithm.clamp(-12, 12).exp()  # beyond that float32 has nothing to tell it from 0 or infinity

    def _nodes(self, hidden_states: Tensor) -> Tensor | None:
        """``[HQ, order + 1]`` or ``[B, T, HQ, order + 1]`` in float32; None for the operator's own."""
        if self.nodes == "chebyshev":
            return None
        logits = _wide(self.node_logits)
        if self.nodes == "token":
            logits = logits + _wide(self.node_proj(hidden_states))[..., None]
        return torch.sigmoid(logits)

    def _log_decay(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor | None:
        """``[B, T, num_kv_heads]`` in float32 or float64, 0 at pads, or None."""
        if self.decay == "none":
            return None
        if self.decay == "fixed":
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            exponent = torch.arange(5, 5 + self.num_kv_heads, dtype=dtype, device=hidden_states.device)
            g = torch.log1p(-torch.exp2(-exponent)).expand(*hidden_states.shape[:2], -1)
        else:
            dt = F.softplus(_wide(self.decay_proj(hidden_states)) + _wide(self.dt_bias))
            g = -_wide(self.A_log).exp() * dt
        return g if mask is None else g * mask

    def _positions(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LayerState | None,
    ) -> tuple[Tensor, Tensor]:
        """Positions ``[B or 1, T]`` of the tokens, and ``[B or N]`` of the tokens to come."""
        batch, length, _ = hidden_states.shape
        start = None if state is None else state.position
        parallel = self.sequence_parallel
        if cu_seqlens is not None:
            lengths = cu_seqlens.long().diff()
            end = lengths if start is None else start + lengths
            if position_ids is None:
                packed = positions_in_packed if parallel is None else parallel.positions_in_packed
                sequence, position_ids = packed(cu_seqlens, length)
                if start is not None:
                    position_ids = position_ids + start[sequence]
                position_ids = position_ids[None]
            return position_ids, end
        if position_ids is not None:
            if parallel is not None:
                return position_ids, parallel.position_after(position_ids).expand(batch).clone()
            return position_ids, (position_ids[:, -1] + 1).expand(batch).clone()
        if attention_mask is None:
            counted = torch.arange(1, length + 1, device=hidden_states.device).expand(batch, length)
        else:
            counted = (attention_mask != 0).long().cumsum(1)
        end = counted[:, -1] if length else counted.new_zeros(batch)
        if parallel is not None:
            counted, end = parallel.counted(counted, attention_mask is not None)
        if start is not None:
            counted, end = counted + start[:, None], end + start
        return (counted - 1).clamp(min=0), end.clone()

    def _check_inputs(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        shape = tuple(hidden_states.shape)
        if len(shape) != 3 or shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states has shape {shape}; expected [B, T, {self.hidden_size}]")
        batch, length, _ = shape
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected [{batch}, {length}]")
        if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected [{batch}, {length}]")
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"cu_seqlens needs one packed row, but hidden_states has batch size {batch}")
            if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; expected int32 or int64 [N + 1]"
                )

    def _check_state(self, name: str, state: LayerState | None, sequences: int) -> None:
        """The operator checks its own part."""
        if state is None:
            return
        if not isinstance(state, LayerState):
            raise TypeError(f"{name} must be a LayerState, got {type(state).__name__}")
        expected = {
            "conv": (sequences, self.channels, self.conv_size - 1) if self.conv_size else None,
            "position": (sequences,) if self.rope_theta is not None else None,
        }
        for field, shape in expected.items():
            x = getattr(state, field)
            found = None if x is None else tuple(x.shape)
            if found != shape:
                raise ValueError(f"{name}.{field} has shape {found}; this layer and input need {shape}")

    def extra_repr(self) -> str:
        return (
            f"op={self.op!r}, "
            + (f"order={self.order}, nodes={self.nodes!r}, " if self.op == "hla_q" else f"p={self.p!r}, ")
            + f"write_gate={self.write_gate}, heads={self.num_heads}/{self.num_kv_heads}, "
            f"head_dim={self.head_dim}/{self.head_v_dim}, decay={self.decay!r}, conv_size={self.conv_size}, "
            + ", ".join(f"{name}={value!r}" for name, value in self.coefficients.items())
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
