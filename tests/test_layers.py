"""The layer: one result whether a sequence is processed at once, in pieces, token by token, padded or packed."""

import math

import pytest
import torch
from torch.nn import functional as F

import hla
from hla import layers
from hla.convolution import positions_in_packed, short_convolution
from hla.layer_state import LayerState, state_tensors
from hla.layers import HigherOrderLinearAttention
from hla.rotary import apply_rope, rope_cos_sin

HIDDEN = 24
PAPER = {"decay": "none", "p": "q", "ridge": 0.0, "gain": 1.0, "value_ridge": 0.0, "value_gain": 1.0}

# One entry per option (or pair that could interact); every operator, inner query, coefficient, decay and norm occurs.
OPTIONS = {
    "default": {},
    "hla_q token": {"nodes": "token", "decay": "token", "num_kv_heads": 2, "rope_theta": 100.0},
    "hla_q constants": {"nodes": "chebyshev", "ridge": 0.5, "write_gate": False, "order": 1, "head_v_dim": 5},
    "hla_q ridge per head": {"ridge": "head", "decay": "fixed", "order": 2, "num_kv_heads": 1},
    "linear_attn": {"op": "linear_attn"},
    "hla2 write gate": {"op": "hla2", "write_gate": True, "decay": "token", "num_kv_heads": 2},
    "linear_attn token decay": {"op": "linear_attn", "decay": "token"},
    "hla2 paper": {"op": "hla2", **PAPER},
    "hla2 fixed decay": {"op": "hla2", "decay": "fixed"},
    "hla2 token decay": {"op": "hla2", "decay": "token"},
    "hla2 rope": {"op": "hla2", "rope_theta": 100.0, "decay": "token"},
    "hla2 grouped q": {"op": "hla2", **PAPER, "num_kv_heads": 2, "rope_theta": 100.0},
    "hla2 grouped k": {"op": "hla2", "num_kv_heads": 2, "decay": "fixed"},
    "hla2 own p": {"op": "hla2", "p": "proj", "ridge": "head", "gain": "head", "num_kv_heads": 1, "rope_theta": 100.0},
    "hla2 token coefficients": {"op": "hla2", "p": "q", "ridge": "token", "gain": "token", "num_kv_heads": 2},
    "hla2 normalized": {"op": "hla2", **PAPER, "normalize": True, "feature_map": "elu1", "decay": "fixed"},
    "hla2 bare": {
        "op": "hla2", **PAPER, "conv_size": 0, "output_norm": False, "output_gate": False, "feature_map": "identity",
    },
    "hla2 bias": {"op": "hla2", "bias": True, "conv_size": 1, "qk_norm": "none", "feature_map": "relu"},
    "hla2 rms": {"op": "hla2", "qk_norm": "rms", "scale": 0.1},
    "ahla": {"op": "ahla", "decay": "token"},
    "ahla paper": {"op": "ahla", **PAPER, "qk_norm": "rms"},
    "ahla own p": {"op": "ahla", "p": "proj", "ridge": 1.0, "gain": "token", "num_kv_heads": 2},
    "ahla normalized": {"op": "ahla", **PAPER, "normalize": True, "feature_map": "relu"},
    "hla3": {"op": "hla3", "decay": "token", "head_v_dim": 5},
    "hla3 paper": {"op": "hla3", **PAPER, "num_kv_heads": 2},
    "hla3 values only": {"op": "hla3", "ridge": 1.0, "gain": 0.0},
    "hla3 learned": {
        "op": "hla3", "p": "proj", "ridge": "head", "gain": "token", "value_ridge": "token", "value_gain": "head",
        "rope_theta": 100.0,
    },
    "hla3 normalized": {"op": "hla3", **PAPER, "normalize": True, "feature_map": "elu1"},
}  # fmt: skip

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def make_layer(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return HigherOrderLinearAttention(HIDDEN, num_heads=4, head_dim=6, **options).to(dtype)


def tokens(batch, length, dtype=torch.float64, seed=1):
    return torch.randn(batch, length, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_states_close(actual: LayerState, expected: LayerState):
    for a, b in zip(state_tensors(actual), state_tensors(expected), strict=True):
        close(a, b)


# -- one result, many ways ------------------------------------------------------------------------------------------


@every_option
@torch.no_grad()
def test_pieces_and_single_tokens_give_what_one_pass_gives(options):
    layer, x = make_layer(**options), tokens(2, 75)
    whole, final = layer(x, output_state=True)

    outputs, state, start = [], None, 0
    for length in (1, 2, 66, 0, 3, 1, 1, 1):
        y, state = layer(x[:, start : start + length], state=state, output_state=True)
        outputs.append(y)
        start += length
    assert start == x.shape[1]
    close(torch.cat(outputs, 1), whole)
    assert_states_close(state, final)

    outputs, state = [], layer.zero_state(2, x.dtype, x.device)
    for t in range(x.shape[1]):
        y, state = layer(x[:, t : t + 1], state=state, output_state=True)
        outputs.append(y)
    close(torch.cat(outputs, 1), whole)
    assert_states_close(state, final)


@every_option
@torch.no_grad()
def test_packed_sequences_give_what_separate_ones_give(options):
    layer = make_layer(**options)
    borders = torch.tensor([0, 3, 3, 70, 71, 80], dtype=torch.int32)
    x = tokens(1, 80)
    packed, final = layer(x, cu_seqlens=borders, output_state=True)
    stateless, none = layer(x, cu_seqlens=borders)
    assert none is None
    close(stateless, packed)
    again, final_again = layer(x, cu_seqlens=borders, state=final, output_state=True)
    for n, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        part = x[:, start:end]
        y, state = layer(part, output_state=True)
        close(packed[:, start:end], y)
        assert_states_close(row(final, n), state)
        y, state = layer(part, state=state, output_state=True)
        close(again[:, start:end], y)
        assert_states_close(row(final_again, n), state)


def row(state: LayerState, n: int) -> LayerState:
    one = lambda x: None if x is None else x[n : n + 1]  # noqa: E731
    return LayerState(one(state.conv), type(state.op)(*map(one, state.op)), one(state.position))


@every_option
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(options, side):
    layer, x = make_layer(**options), tokens(1, 20)
    noise = tokens(1, 9, seed=2) * 10  # what stands at pads does not matter
    padded = torch.cat([noise, x] if side == "left" else [x, noise], 1)
    other = tokens(1, 29, seed=3)  # beside a full sequence
    mask = torch.ones(2, 29, dtype=torch.int64)
    real = slice(9, None) if side == "left" else slice(None, 20)
    mask[0] = 0
    mask[0, real] = 1

    alone, state = layer(x, output_state=True)
    both, states = layer(torch.cat([padded, other]), attention_mask=mask, output_state=True)
    close(both[:1, real], alone)
    close(both[1:], layer(other)[0])
    for a, b in zip(row(states, 0).op, state.op, strict=True):
        close(a, b)
    if side == "left":
        assert_states_close(row(states, 0), state)
        step = tokens(2, 1, seed=4)
        close(layer(step, state=states)[0][:1], layer(step[:1], state=state)[0])
        piece, pieces = layer(step[:, :0], state=states, attention_mask=mask[:, :0], output_state=True)
        assert piece.shape == (2, 0, HIDDEN)
        assert_states_close(pieces, states)

    weight = tokens(1, 20, seed=5)
    grads = torch.autograd.grad((alone * weight).sum(), list(layer.parameters()))
    grads_padded = torch.autograd.grad((both[:1, real] * weight).sum(), list(layer.parameters()))
    for a, b in zip(grads_padded, grads, strict=True):
        close(a, b, 1e-9)


@torch.no_grad()
def test_pads_reach_the_operator_as_zeros(monkeypatch):
    layer = make_layer(op="hla2", p="proj", ridge=1.0, gain=0.1, feature_map="elu1", decay="token")
    mask = torch.ones(2, 9)
    mask[0, :4] = mask[1, 6:] = 0
    seen = {}

    def operator(q, k, v, **options):
        seen.update(q=q, k=k, v=v, p=options["p"], g=options["g"])
        return hla.hla2(q, k, v, **options)

    monkeypatch.setitem(layers.OPERATORS, "hla2", operator)
    layer(tokens(2, 9), attention_mask=mask)
    for name in ("q", "k", "v", "p", "g"):
        assert bool((seen[name][mask == 0] == 0).all()) and bool((seen[name][mask == 1] != 0).all()), name


@every_option
@torch.no_grad()
def test_causal_to_the_bit(options):
    layer, x = make_layer(torch.float32, **options), tokens(2, 90, torch.float32)
    y, _ = layer(x)
    for t in (0, 1, 63, 64, 70):
        changed = x.clone()
        changed[:, t] += 1
        z, _ = layer(changed)
        assert torch.equal(y[:, :t], z[:, :t])
        assert not torch.equal(y[:, t], z[:, t])


@every_option
def test_every_parameter_is_used_and_learns(options):
    layer, x = make_layer(**options), tokens(2, 12)
    y, _ = layer(x)
    (y * tokens(2, 12, seed=2)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
        assert bool(parameter.grad.isfinite().all()), name


@every_option
def test_gradient_through_states(options):
    """Truncated backpropagation may choose not to truncate: two pieces give the gradient of the whole."""
    layer, x = make_layer(**options), tokens(1, 10)
    weight = tokens(1, 10, seed=2)
    expected = torch.autograd.grad((layer(x)[0] * weight).sum(), list(layer.parameters()))
    first, state = layer(x[:, :9], output_state=True)
    last, _ = layer(x[:, 9:], state=state)
    actual = torch.autograd.grad((torch.cat([first, last], 1) * weight).sum(), list(layer.parameters()))
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e-9)


@every_option
@torch.no_grad()
def test_out_state_is_written_in_place(options):
    layer, x = make_layer(torch.float32, **options), tokens(2, 7, torch.float32)
    state = layer.zero_state(2, x.dtype, x.device)
    addresses = [t.data_ptr() for t in state_tensors(state)]
    expected = None
    for part in (x[:, :4], x[:, 4:5], x[:, 5:7]):
        y_expected, expected = layer(part, state=expected, output_state=True)
        y, returned = layer(part, state=state, out_state=state)
        assert returned is state
        close(y, y_expected, 1e-5)
    for a, b in zip(state_tensors(state), state_tensors(expected), strict=True):
        close(a, b, 1e-5)
        assert a.dtype in (torch.float32, torch.int64)
    assert addresses == [t.data_ptr() for t in state_tensors(state)]


@torch.no_grad()
def test_a_state_that_is_given_is_not_changed():
    layer, x = make_layer(rope_theta=100.0), tokens(2, 9)
    _, state = layer(x, output_state=True)
    before = [t.clone() for t in state_tensors(state)]
    for part in (x[:, :1], x):
        layer(part, state=state, output_state=True)
        assert all(torch.equal(a, b) for a, b in zip(state_tensors(state), before, strict=True))


@pytest.mark.parametrize("length", [1, 3])
def test_out_state_holds_no_graph_and_spoils_none(length):
    layer, x = make_layer(), tokens(2, length)
    with torch.no_grad():
        _, state = layer(tokens(2, 5, seed=2), output_state=True)
    expected = torch.autograd.grad(layer(x, state=state)[0].sum(), list(layer.parameters()))
    y, _ = layer(x, state=state, out_state=state)
    assert y.requires_grad and not any(t.requires_grad for t in state_tensors(state))
    for a, b in zip(torch.autograd.grad(y.sum(), list(layer.parameters())), expected, strict=True):
        close(a, b)


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["linear_attn", "hla2", "ahla", "hla3"])
@torch.no_grad()
def test_published_operator_is_a_few_arguments_away(op):
    layer = make_layer(
        op=op, **PAPER, conv_size=0, feature_map="identity", qk_norm="none", output_norm=False, output_gate=False
    )
    x = tokens(2, 30)
    q, k, v = (part.unflatten(-1, (4, 6)) for part in layer.qkv_proj(x).chunk(3, -1))
    close(layer(x)[0], layer.o_proj(getattr(hla.reference, op)(q, k, v).flatten(2)))


@pytest.mark.parametrize("op", ["hla2", "ahla", "hla3"])
@torch.no_grad()
def test_delta_form_corrects_by_what_came_before(op):
    """k~_j = k_j - b_j S_{j-1} k_j and v~_j = v_j - b_j P_{j-1}^T k_j, with decay."""
    layer = make_layer(op=op, conv_size=0, output_norm=False, output_gate=False, decay="fixed", feature_map="silu")
    layer.log_b += torch.tensor([0.0, 1.0, 2.0, 3.0])
    x = tokens(1, 15)
    q, k, v = (part.unflatten(-1, (4, 6)) for part in layer.qkv_proj(x).chunk(3, -1))
    q, k = (F.silu(part) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    b = layer.log_b.exp() * torch.sigmoid(layer.b_proj(x))
    gamma = 1 - 2.0 ** -torch.arange(5, 9, dtype=torch.float64)
    o = torch.zeros_like(v)
    for h in range(4):
        S = P = M = torch.zeros(6, 6, dtype=torch.float64)
        for t in range(15):
            S, P, M = gamma[h] ** 2 * S, gamma[h] * P, gamma[h] * M
            key, value = k[0, t, h], v[0, t, h]
            new_key = key - b[0, t, h] * S @ key if op != "ahla" else key
            new_value = value - b[0, t, h] * P.T @ key if op != "hla2" else value
            S, P = S + torch.outer(key, key), P + torch.outer(key, value)
            M = M + torch.outer(new_key, new_value)
            o[0, t, h] = 6**-0.5 * M.T @ q[0, t, h]
    close(layer(x)[0], layer.o_proj(o.flatten(2)))


@torch.no_grad()
@pytest.mark.parametrize("nodes", ["chebyshev", "head", "token"])
def test_query_side_reads_what_least_squares_would(nodes):
    """q~ = (S + ridge I)^{-1} q up to the order's polynomial, with every token's share b in S and P."""
    layer = make_layer(order=3, nodes=nodes, conv_size=0, output_norm=False, output_gate=False, decay="fixed")
    layer.ridge_head += torch.tensor([0.0, 1.0, -1.0, 0.5])
    x = tokens(1, 15)
    q, k, v = (part.unflatten(-1, (4, 6)) for part in layer.qkv_proj(x).chunk(3, -1))
    q, k = (F.silu(part) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    b = torch.sigmoid(layer.write_proj(x))
    ridge = (layer.ridge_head + layer.ridge_proj(x)).exp()
    if nodes == "chebyshev":
        node = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(4, dtype=torch.float64) + 0.5) / 4)
    else:
        layer.node_logits += torch.rand_like(layer.node_logits)
        node = torch.sigmoid(layer.node_logits + (layer.node_proj(x)[..., None] if nodes == "token" else 0.0))
    node = node.expand(1, 15, 4, 4)
    gamma = 1 - 2.0 ** -torch.arange(5, 9, dtype=torch.float64)
    o = torch.zeros_like(v)
    for h in range(4):
        S = P = torch.zeros(6, 6, dtype=torch.float64)
        for t in range(15):
            key = k[0, t, h]
            S = gamma[h] * S + b[0, t, h] * torch.outer(key, key)
            P = gamma[h] * P + b[0, t, h] * torch.outer(key, v[0, t, h])
            A = S + ridge[0, t, h] * torch.eye(6, dtype=torch.float64)
            y = torch.zeros(6, dtype=torch.float64)
            for m in node[0, t, h]:
                y = y + (q[0, t, h] - A @ y) / (ridge[0, t, h] + m * S.trace())
            o[0, t, h] = P.T @ y
    close(layer(x)[0], layer.o_proj(o.flatten(2)))


@torch.no_grad()
def test_norm_and_gate_of_the_output():
    layer, x = make_layer(), tokens(1, 9)
    layer.o_norm.weight.copy_(torch.rand(6))
    plain = make_layer(output_norm=False, output_gate=False)
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.o_proj.weight.copy_(torch.eye(HIDDEN))
    o = plain(x)[0].unflatten(-1, (4, 6))
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.o_norm.weight
    close(layer(x)[0], layer.o_proj(normed.flatten(2) * F.silu(layer.gate_proj(x))))


@torch.no_grad()
def test_decays():
    layer, x = make_layer(decay="token", num_kv_heads=2), tokens(2, 5)
    expected = -layer.A_log.exp() * F.softplus(layer.decay_proj(x) + layer.dt_bias)
    close(layer._log_decay(x, None), expected)
    assert layer._log_decay(x.float(), None).dtype == torch.float32 if layer.float() else None
    half = make_layer(torch.bfloat16, decay="token")._log_decay(x.bfloat16(), None)
    assert half.dtype == torch.float32 and half.max() < 0
    fixed = make_layer(decay="fixed", num_kv_heads=2)._log_decay(x, None)
    close(fixed[0, 0], torch.tensor([math.log(1 - 1 / 32), math.log(1 - 1 / 64)], dtype=torch.float64))
    assert make_layer(decay="none")._log_decay(x, None) is None


def test_start_values():
    layer = make_layer(torch.float32, op="hla3", ridge="head", gain="token", decay="token", num_kv_heads=2)
    close(layer.log_b, torch.full((2,), -3.0))
    query_side = make_layer(torch.float32, order=1)
    close(query_side.ridge_head, torch.zeros(4))
    close(torch.sigmoid(query_side.node_logits), torch.tensor([[0.1464466, 0.8535534]]).expand(4, 2), 1e-6)
    close(layer.ridge_head, torch.ones(2))
    close(layer.gain_head, torch.full((2,), math.exp(-3)), 1e-6)
    dt = F.softplus(layer.dt_bias)
    assert bool(((dt >= 0.9e-3) & (dt <= 0.101)).all())
    assert bool(((layer.A_log >= 0) & (layer.A_log <= math.log(16))).all())
    assert 0.015 < layer.conv_weight.std() < 0.025


def test_rope_is_relative():
    x = tokens(1, 6).unflatten(-1, (4, 6))
    for shift in (0, 5):
        position = torch.tensor([[shift, shift + 3]])
        q, k = (apply_rope(part, *rope_cos_sin(position, 6, 100.0, x.dtype)) for part in (x[:, :2], x[:, 2:4]))
        scores = (q[:, 0] * k[:, 1]).sum(-1)
        if shift == 0:
            expected = scores
    close(scores, expected)
    assert not torch.allclose(scores, (x[:, 0] * x[:, 3]).sum(-1))
    angle = 3 * 100.0 ** (-2 / 6)  # features 1 and 4 turn by the position times theta^(-2/6)
    one = F.one_hot(torch.tensor(1), 6).double()[None, None, None]
    turned = apply_rope(one, *rope_cos_sin(torch.tensor([[3]]), 6, 100.0, one.dtype))[0, 0, 0]
    close(turned, torch.tensor([0, math.cos(angle), 0, 0, math.sin(angle), 0], dtype=torch.float64))


@torch.no_grad()
def test_position_ids():
    layer, x = make_layer(rope_theta=100.0), tokens(2, 8)
    y, state = layer(x, output_state=True)
    shifted, shifted_state = layer(x, position_ids=torch.arange(8)[None] + 11, output_state=True)
    close(shifted, y)
    assert shifted_state.position.tolist() == [19, 19] and state.position.tolist() == [8, 8]
    apart, _ = layer(x, position_ids=torch.arange(8)[None] * 3)
    assert not torch.allclose(apart, y)
    step = tokens(2, 1, seed=3)
    close(layer(step, state=state)[0], layer(step, state=state, position_ids=torch.tensor([[8], [8]]))[0])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"op": "hla2"}, {"op": "hla3", "decay": "token", "rope_theta": 100.0}])
def test_bfloat16_is_close(options):
    layer, x = make_layer(torch.float32, **options), tokens(2, 100, torch.float32)
    y, _ = layer(x)
    low, state = layer.bfloat16()(x.bfloat16(), output_state=True)
    assert low.dtype == torch.bfloat16 and state.op[0].dtype == torch.float32 and state.conv.dtype == torch.float32
    assert (low - y).norm() / y.norm() < 0.03
    one, _ = layer(x[:, :1].bfloat16(), state=state)
    assert one.dtype == torch.bfloat16


@torch.no_grad()
def test_autocast():
    layer, x = make_layer(torch.float32, decay="token"), tokens(2, 70, torch.float32)
    y, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, state = layer(x, output_state=True)
        layer(x[:, :1], state=state)
    assert (low - y).norm() / y.norm() < 0.03
    assert state.op[0].dtype == torch.float32


def test_shapes_on_the_meta_device():
    layer = make_layer(torch.float32, decay="token").to("meta")
    y, state = layer(torch.empty(2, 70, layer.hidden_size, device="meta"), output_state=True)
    assert y.is_meta and y.shape == (2, 70, layer.hidden_size) and state.op[0].is_meta


# -- the convolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_convolution(size, length):
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, size, dtype=torch.float64, requires_grad=True)
    history = torch.randn(2, 3, size - 1, dtype=torch.float64)
    for past in (torch.zeros_like(history), history):
        y, after = short_convolution(x, weight, None, past, True)
        whole = torch.cat([past, x.mT], -1)
        if length:
            close(y, F.conv1d(whole, weight[:, None], groups=3).mT)
        close(after, whole[..., whole.shape[-1] - size + 1 :])
    close(short_convolution(x, weight)[0], short_convolution(x, weight, None, None, True)[0])
    if length:
        assert torch.autograd.gradcheck(lambda x, w: short_convolution(x, w)[0], (x, weight))


def test_convolution_stays_inside_packed_sequences():
    borders = torch.tensor([0, 0, 2, 3, 9, 9])
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    history = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    y, _ = short_convolution(x, weight, borders)
    z, after = short_convolution(x, weight, borders, history, True)
    for n, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        part = x[:, start:end]
        close(y[:, start:end], short_convolution(part, weight)[0])
        expected, expected_after = short_convolution(part, weight, None, history[n : n + 1], True)
        close(z[:, start:end], expected)
        close(after[n : n + 1], expected_after)
    assert torch.autograd.gradcheck(lambda x, w: short_convolution(x, w, borders)[0], (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, h: short_convolution(x, w, borders, h, True), (x, weight, history))
    sequence, position = positions_in_packed(borders, 9)
    assert sequence.tolist() == [1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert position.tolist() == [0, 1, 0, 0, 1, 2, 3, 4, 5]


# -- bad arguments ----------------------------------------------------------------------------------------------------

BAD = [
    ({"hidden_size": 0}, ValueError, "hidden_size"),
    ({"hidden_size": 24.0}, TypeError, "hidden_size"),
    ({"num_heads": 0}, ValueError, "num_heads"),
    ({"num_heads": True}, TypeError, "num_heads"),
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
    ({"hidden_size": 25, "head_dim": None}, ValueError, "hidden_size"),
    ({"head_dim": 257}, ValueError, "head_dim"),
    ({"head_v_dim": 0}, ValueError, "head_v_dim"),
    ({"op": "hla4"}, ValueError, "op"),
    ({"op": None}, TypeError, "op"),
    ({"p": "v"}, ValueError, "p must"),
    ({"ridge": "channel"}, ValueError, "ridge"),
    ({"gain": "tokens"}, ValueError, "gain"),
    ({"op": "hla3", "value_ridge": "x"}, ValueError, "value_ridge"),
    ({"value_gain": True}, TypeError, "value_gain"),
    ({"ridge": True, "gain": 1.0}, TypeError, "ridge"),
    ({"ridge": float("nan"), "gain": 1.0}, ValueError, "ridge"),
    ({"op": "hla2", "gain": 1.0}, ValueError, "ridge and gain"),
    ({"op": "hla2", "ridge": "head"}, ValueError, "only gain"),
    ({"ridge": "delta"}, ValueError, "ridge"),
    ({"ridge": 0.0}, ValueError, "ridge of hla_q must be positive"),
    ({"normalize": True}, ValueError, "normalize"),
    ({"order": 0}, ValueError, "order"),
    ({"order": 2.0}, TypeError, "order"),
    ({"nodes": "delta"}, ValueError, "nodes"),
    ({"nodes": None}, TypeError, "nodes"),
    ({"write_gate": 1}, TypeError, "write_gate"),
    ({"op": "hla3", "value_gain": 1.0}, ValueError, "value_ridge and value_gain"),
    ({"op": "hla2", "p": "q"}, ValueError, 'p = "k"'),
    ({"op": "hla3", "p": "proj", "ridge": 0, "gain": 1}, ValueError, 'p = "k"'),
    ({"decay": "channel"}, ValueError, "decay"),
    ({"conv_size": -1}, ValueError, "conv_size"),
    ({"conv_size": 4.0}, TypeError, "conv_size"),
    ({"rope_theta": 0}, ValueError, "rope_theta"),
    ({"rope_theta": "10000"}, TypeError, "rope_theta"),
    ({"rope_theta": 100.0, "head_dim": 5}, ValueError, "head_dim"),
    ({"feature_map": "exp"}, ValueError, "feature_map"),
    ({"qk_norm": "L2"}, ValueError, "qk_norm"),
    ({"qk_norm": None}, TypeError, "qk_norm"),
    ({"scale": -1.0}, ValueError, "scale"),
    ({"normalize": 1}, TypeError, "normalize"),
    ({"output_norm": "rms"}, TypeError, "output_norm"),
    ({"output_gate": None}, TypeError, "output_gate"),
    ({"bias": 0}, TypeError, "bias"),
    ({"norm_eps": 0.0}, ValueError, "norm_eps"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"heads": 4}, TypeError, "heads"),
]


@pytest.mark.parametrize(("bad", "error", "named"), BAD, ids=[str(bad) for bad, _, _ in BAD])
def test_bad_arguments_are_named(bad, error, named):
    with pytest.raises(error, match=named):
        HigherOrderLinearAttention(**{"hidden_size": HIDDEN, "num_heads": 4, "head_dim": 6, **bad})


BAD_INPUTS = [
    ({"hidden_states": tokens(2, 5)[..., :-1]}, "hidden_states"),
    ({"hidden_states": tokens(2, 5)[0]}, "hidden_states"),
    ({"attention_mask": torch.ones(2, 6)}, "attention_mask"),
    ({"position_ids": torch.arange(5)}, "position_ids"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
    ({"hidden_states": tokens(1, 5), "cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens"),
    ({"hidden_states": tokens(1, 5), "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
    ({"hidden_states": tokens(1, 5), "cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens"),
    ({"hidden_states": tokens(3, 1), "state": make_layer().zero_state(2, torch.float64, "cpu")}, "state"),
    ({"hidden_states": tokens(3, 4), "state": make_layer().zero_state(2, torch.float64, "cpu")}, "state"),
    ({"state": make_layer(conv_size=0).zero_state(2, torch.float64, "cpu")}, "state"),
    ({"state": make_layer(op="ahla").zero_state(2, torch.float64, "cpu")}, "state"),
]


@pytest.mark.parametrize(("bad", "named"), BAD_INPUTS)
def test_bad_inputs_are_named(bad, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make_layer()(**{"hidden_states": tokens(2, 5), **bad})


@every_option
@torch.no_grad()
def test_nan_inputs_are_seen_and_raise_nothing(options):
    x = tokens(2, 9)
    x[0] = math.nan
    y, _ = make_layer(**options)(x)
    assert bool(y[0].isnan().all()) and bool(y[1].isfinite().all())
