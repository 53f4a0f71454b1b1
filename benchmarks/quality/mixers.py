"""The mixers under comparison that are no options of the public layer: peers, and forms of HLA on trial.

All of them are `hla.HigherOrderLinearAttention` with another operator in the middle: projections, convolution,
features, norms, decay and gates are the layer's own, so that a comparison compares operators. They are written as
explicit T x T matrices: the tasks here are at most 512 tokens long.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hla.layers import B_START, HigherOrderLinearAttention

# Steps of conjugate gradients that stand for an exact solution (float32, condition numbers up to some hundreds).
SOLVER_STEPS = 16


def decay_matrix(g: Tensor | None, like: Tensor) -> Tensor:
    """``exp(c_t - c_j)`` for j <= t, else 0: ``[B, H, T, T]`` from log-decays ``[B, H, T]``, ``[T, T]`` without."""
    length = like.shape[-2]
    causal = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
    if g is None:
        return causal.to(like.dtype)
    c = g.cumsum(-1)
    return (c[..., :, None] - c[..., None, :]).masked_fill(~causal, float("-inf")).exp()


def read(queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor) -> Tensor:
    """``LA(queries, keys, values)`` with the explicit matrix ``decay``; all ``[B, H, T, D]``."""
    return ((queries @ keys.mT) * decay) @ values


class QuadraticMixer(HigherOrderLinearAttention):
    """The public layer with ``mix(q, k, v, decay, **coefficients)`` (all ``[B, H, T, D]``) as its operator."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, op="linear_attn", **{"decay": "none", **options})

    def _coefficients(self, hidden_states: Tensor, k: Tensor) -> dict[str, Any]:
        return self.coefficients_of(hidden_states)

    def coefficients_of(self, x: Tensor) -> dict[str, Tensor]:
        """Per-token numbers ``[B, T, H]`` that `mix` takes."""
        return {}

    def _operate(self, q, k, v, options, state, wants_state, out_state, cu_seqlens):
        if state is not None or wants_state or out_state is not None or cu_seqlens is not None:
            raise NotImplementedError(f"{type(self).__name__} has neither states nor packing")
        g = options.pop("g")
        decay = decay_matrix(None if g is None else g.transpose(1, 2), q.transpose(1, 2))
        options = {name: x.transpose(1, 2)[..., None] for name, x in options.items()}
        o = self.mix(*(x.transpose(1, 2) for x in (q, k, v)), decay, **options)
        return o.transpose(1, 2), None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        raise NotImplementedError

    def per_token(self, name: str) -> None:
        """A learned number per token and head: a projection called ``name``."""
        self.add_module(name, nn.Linear(self.hidden_size, self.num_kv_heads, bias=False))

    def operator_numbers(self) -> int | None:
        """Numbers the operator keeps per layer; None if they grow with the sequence."""
        return self.num_kv_heads * self.head_dim * self.head_v_dim


def packed_square(size: int) -> int:
    """Numbers of a symmetric matrix."""
    return size * (size + 1) // 2


class Softmax(QuadraticMixer):
    """Softmax attention."""

    def mix(self, q, k, v, decay):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def operator_numbers(self):
        return None


class DeltaRule(QuadraticMixer):
    """DeltaNet (Schlag et al. 2021; Yang et al. 2024), with a decay GatedDeltaNet (Yang et al. 2025).

    ``P_t = exp(g_t) (I - beta_t k_t k_t^T) P_{t-1} + beta_t k_t v_t^T``, that is ``P_t = exp(g_t) P_{t-1} + k_t u_t^T``
    with the solution u of a triangular system.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.per_token("beta_proj")

    def coefficients_of(self, x):
        return {"beta": torch.sigmoid(self.beta_proj(x))}

    def mix(self, q, k, v, decay, beta):
        return delta_rule(q, k, v, decay, beta)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """``beta [B, H, T, 1]``; the rest as in `read`."""
    system = (beta * (k @ k.mT) * decay).tril(-1) + torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    u = torch.linalg.solve_triangular(system, beta * v, upper=False, unitriangular=True)
    return read(q, k, u, decay)


class NeumannDeltaRule(DeltaRule):
    """The first ``order`` terms of the Neumann series of `delta_rule`: ahla, iterated, with one state per term."""

    def __init__(self, *args: Any, order: int, own_size: bool = False, **options: Any):
        super().__init__(*args, **options)
        self.order, self.own_size = order, own_size
        # The second-order term starts small, as in the layer's "delta", or at the delta rule's own size.
        self.log_b = nn.Parameter(torch.full((self.num_kv_heads,), 0.0 if own_size else math.log(B_START)))

    def mix(self, q, k, v, decay, beta):
        correction = -(self.log_b.exp()[:, None, None] * beta * (k @ k.mT) * decay).tril(-1)
        start = beta * v if self.own_size else v
        u = start
        for _ in range(self.order - 1):
            u = start + correction @ u
        return read(q, k, u, decay)

    def operator_numbers(self):
        return self.order * super().operator_numbers()


class PublishedHLA3(QuadraticMixer):
    """Order 3 as the paper's Algorithm 3 computes it, without decay (Zhang et al. 2025, Theorem 7.1)."""

    def mix(self, q, k, v, decay):
        strict = decay.tril(-1)
        qk = (q * k).sum(-1, keepdim=True)
        a = qk * read(q, k, k, strict) + ((k * read(k, q, q, strict)).sum(-1, keepdim=True) + qk.square()) * k
        b = qk * read(q, k, v, strict)
        return read(q, a, v, decay) + read(q, k, b, decay)

    def operator_numbers(self):
        square, wide = packed_square(self.head_dim), self.head_dim * self.head_v_dim
        return self.num_kv_heads * (2 * square + 3 * wide)


class NormalisedKeys(QuadraticMixer):
    """hla2 with ``k~`` normalised: ``norm`` is ``"l2"`` (per token) or ``"count"`` (by the running weight)."""

    def __init__(self, *args: Any, inner: str, norm: str, **options: Any):
        super().__init__(*args, **options)
        self.inner, self.norm = inner, norm

    def mix(self, q, k, v, decay):
        keys = read(q if self.inner == "q" else k, k, k, decay)
        if self.norm == "l2":
            keys = F.normalize(keys, dim=-1)
        else:
            keys = keys / running_weight(k, torch.ones_like(k[..., :1]), decay)
        return read(q, keys, v, decay)

    def operator_numbers(self):
        return super().operator_numbers() + self.num_kv_heads * packed_square(self.head_dim)


def running_weight(k: Tensor, weight: Tensor, decay: Tensor) -> Tensor:
    """The trace of ``S_t = sum_j decay_tj weight_j k_j k_j^T``, a bound of its spectrum: ``[B, H, T, 1]``."""
    return decay @ (weight * k.square().sum(-1, keepdim=True))


class OwnMoment(QuadraticMixer):
    """The protecting form with S built from other keys s: ``k~_j = k_j - b_j S_{j-1} k_j``, ``S = sum s s^T``."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.per_token("b_proj")
        self.log_b = nn.Parameter(torch.full((self.num_kv_heads,), math.log(B_START)))
        self.s_proj = nn.Linear(self.hidden_size, self.num_kv_heads * self.head_dim, bias=False)

    def coefficients_of(self, x):
        # s rides along as per-token numbers: [B, T, heads of s * width] seen as [B, T, H, K] by mix.
        return {"b": torch.sigmoid(self.b_proj(x)), "s": self.s_proj(x)}

    def mix(self, q, k, v, decay, b, s):
        s = s[..., 0].transpose(1, 2).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        s = self._normalised(s)
        keys = k - self.log_b.exp()[:, None, None] * b * read(k, s, s, decay.tril(-1))
        return read(q, keys, v, decay)

    def operator_numbers(self):
        return super().operator_numbers() + self.num_kv_heads * packed_square(self.head_dim)


class MomentPolynomial(QuadraticMixer):
    """Polynomials of the key moment S on the query side, on the key side, or on both.

    ``x ~ (S + lambda I)^{-1} y`` comes from the iteration ``x <- x + r / theta_n``, ``r <- r - (S r + lambda r) /
    theta_n`` from ``x = 0, r = y``: with n nodes n - 1 readings of S. On the query side ``q~_t = x(S_t, q_t)`` from
    ``query`` readings; on the key side ``k~_j = k_j - S_{j-1} x(S_{j-1}, k_j)`` from ``key`` readings, the part of k_j
    that earlier keys do not span. The nodes ``theta_n = lambda + m_n trace(S)`` start all in the middle
    (``"richardson"``) or at Chebyshev's (``"chebyshev"``) of ``[0, reach]``; m_n and lambda are learned per head, with
    ``token_nodes`` and ``token_ridge`` per token too. Writes are weighted by ``b_j = sigmoid(per token)`` in S and P
    alike unless ``write_gate`` is False. ``exact`` solves the query side by conjugate gradients instead.
    """

    def __init__(
        self,
        *args: Any,
        query: int = 0,
        key: int = 0,
        nodes: str = "chebyshev",
        reach: float = 1.0,
        token_nodes: bool = False,
        token_ridge: bool = False,
        write_gate: bool = True,
        exact: bool = False,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self.query, self.key, self.exact = query, key, exact
        self.log_lambda = nn.Parameter(torch.zeros(self.num_kv_heads))
        for side, count in (("query", query + 1 if query else 0), ("key", key)):
            if count:
                start = start_nodes(count, nodes, reach).repeat(self.num_kv_heads, 1)
                self.register_parameter(f"{side}_nodes", nn.Parameter(start))
        self.learned = [
            name
            for name, wanted in (("b_proj", write_gate), ("ridge_proj", token_ridge), ("node_proj", token_nodes))
            if wanted
        ]
        for name in self.learned:
            self.per_token(name)

    def coefficients_of(self, x):
        return {name: self.get_submodule(name)(x) for name in self.learned}

    def mix(self, q, k, v, decay, b_proj=None, ridge_proj=None, node_proj=None):
        b = torch.ones_like(k[..., :1]) if b_proj is None else torch.sigmoid(b_proj)
        log_ridge = self.log_lambda[:, None, None] + (0.0 if ridge_proj is None else ridge_proj)
        ridge = log_ridge.exp().expand_as(b)
        shift = 0.0 if node_proj is None else node_proj
        keys, x = k, q
        if self.key:
            strict = decay.tril(-1)
            theta = self.thetas("key", ridge, running_weight(k, b, strict), shift)
            keys = k - read(iterate(k, k, b * k, ridge, strict, theta), k, b * k, strict)
        if self.exact:
            x = solve(q, k, b, ridge, decay, iterations=SOLVER_STEPS)
        elif self.query:
            theta = self.thetas("query", ridge, running_weight(k, b, decay), shift)
            x = iterate(q, k, b * k, ridge, decay, theta)
        return read(x, keys, b * v, decay)

    def thetas(self, side: str, ridge: Tensor, trace: Tensor, shift: float | Tensor) -> list[Tensor]:
        logits = self.get_parameter(f"{side}_nodes")
        return [ridge + torch.sigmoid(column[:, None, None] + shift) * trace for column in logits.T]

    def operator_numbers(self):
        # S, P, and unless solved exactly the running trace.
        return super().operator_numbers() + self.num_kv_heads * (packed_square(self.head_dim) + (not self.exact))


def start_nodes(count: int, kind: str, reach: float) -> Tensor:
    """Logits of the nodes m_n of an iteration with ``count`` steps for a spectrum in ``[0, reach]`` of the trace."""
    angles = torch.pi * (torch.arange(count) + 0.5) / count
    spread = {"richardson": torch.zeros(count), "chebyshev": torch.cos(angles)}[kind]
    return torch.logit(reach * (0.5 + 0.5 * spread).clamp(1e-3, 1 - 1e-3))


def iterate(y: Tensor, k: Tensor, bk: Tensor, ridge: Tensor, decay: Tensor, theta: list[Tensor]) -> Tensor:
    """``x ~ (S + ridge I)^{-1} y`` for ``S = sum decay bk k^T`` with one step per node: ``len(theta) - 1`` readings."""
    x, r = y / theta[0], y
    for previous, node in zip(theta, theta[1:], strict=False):
        r = r - (read(r, k, bk, decay) + ridge * r) / previous
        x = x + r / node
    return x


def solve(q: Tensor, k: Tensor, b: Tensor, ridge: Tensor, decay: Tensor, iterations: int) -> Tensor:
    """``(S_t + ridge_t I)^{-1} q_t`` by conjugate gradients, ``S_t = sum_j decay_tj b_j k_j k_j^T``."""
    return _Solve.apply(q, k, b, ridge, decay, iterations)


class _Solve(torch.autograd.Function):
    """The gradient solves once more: with ``A x = q`` and ``y = A^{-1} dx``, ``dq = y`` and ``dA = -y x^T``."""

    @staticmethod
    def forward(ctx, q, k, b, ridge, decay, iterations):
        x = _conjugate_gradients(q, k, b, ridge, decay, iterations)
        ctx.save_for_backward(x, k, b, ridge, decay)
        ctx.iterations = iterations
        return x

    @staticmethod
    def backward(ctx, dx):
        x, *inputs = ctx.saved_tensors
        y = _conjugate_gradients(dx, *inputs, ctx.iterations)
        leaves = [z.detach().requires_grad_() for z in inputs]
        with torch.enable_grad():
            product = _moment(x, *leaves)
        grads = torch.autograd.grad(product, leaves, -y, allow_unused=True)
        return y, *grads, None


def _moment(x: Tensor, k: Tensor, b: Tensor, ridge: Tensor, decay: Tensor) -> Tensor:
    return read(x, k, b * k, decay) + ridge * x


def _conjugate_gradients(q, k, b, ridge, decay, iterations):
    bk = b * k
    x, r, p = torch.zeros_like(q), q, q
    square = r.square().sum(-1, keepdim=True)
    tiny = torch.finfo(q.dtype).tiny
    for _ in range(iterations):
        ap = torch.addcmul(read(p, k, bk, decay), ridge, p)
        alpha = square / (p * ap).sum(-1, keepdim=True).clamp(min=tiny)
        x, r = x + alpha * p, r - alpha * ap
        new = r.square().sum(-1, keepdim=True)
        p, square = r + new / square.clamp(min=tiny) * p, new
    return x


class WriteGated(HigherOrderLinearAttention):
    """The public layer with keys and values weighted by ``sqrt(beta_j)`` and ``beta_j``, beta = sigmoid(per token).

    So every token decides how much it counts in S and P. ``keys`` False weighs the values alone. ``own_size`` starts
    the second-order term at the delta rule's own size (b = beta) instead of small.
    """

    def __init__(self, *args: Any, keys: bool = True, own_size: bool = False, **options: Any):
        super().__init__(*args, **{"decay": "none", **options})
        self.beta_proj = nn.Linear(self.hidden_size, self.num_kv_heads, bias=False)
        self.keys, self.own_size = keys, own_size
        if own_size:
            del self.log_b, self.b_proj  # b is beta

    def _project(self, hidden_states, *args):
        q, k, v, p, conv = super()._project(hidden_states, *args)
        beta = torch.sigmoid(self.beta_proj(hidden_states))[..., None]
        return q, k * beta.sqrt() if self.keys else k, v * beta, p, conv

    def _coefficients(self, hidden_states, k):
        if not self.own_size:
            return super()._coefficients(hidden_states, k)
        b = torch.sigmoid(self.beta_proj(hidden_states))
        values = {"gain": -b / self.scale, "ridge": 1 + b * k.square().sum(-1)}
        return {name: values[name.removeprefix("value_")] for name in self.coefficients}


class MixedOrders(nn.Module):
    """Several mixers side by side, each with its own heads; their outputs are added."""

    def __init__(self, *mixers: nn.Module):
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return sum(mixer(x)[0] for mixer in self.mixers), None


def state_numbers(mixer: nn.Module) -> int | None:
    """Numbers a layer keeps between two tokens: operator (symmetric S packed) and convolution; None if it grows."""
    if isinstance(mixer, MixedOrders):
        parts = [state_numbers(part) for part in mixer.mixers]
        return None if None in parts else sum(parts)  # type: ignore[arg-type]
    assert isinstance(mixer, HigherOrderLinearAttention)
    convolution = mixer.channels * max(0, mixer.conv_size - 1)
    if isinstance(mixer, QuadraticMixer):
        operator = mixer.operator_numbers()
    else:
        state = mixer.zero_state(1, torch.float32, "meta").op
        operator = sum(x.numel() for name, x in state._asdict().items() if x is not None and name != "S")
        if "S" in state._fields:
            operator += mixer.num_kv_heads * packed_square(mixer.head_dim)
    return None if operator is None else operator + convolution
