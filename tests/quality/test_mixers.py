"""The comparison of mixers: every mixer is what its name says, the task is recall, and the runner loses no run."""

import numpy
import pytest
import torch
from torch.nn import functional as F

from benchmarks.quality import mixers
from benchmarks.quality.arms import ARMS
from benchmarks.quality.plan import state_track, width_track
from hla.layers import HigherOrderLinearAttention


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def sequence(length=10, dim=4, v_dim=3, batch=2, heads=2):
    """q, unit keys, v ``[B, H, T, D]``, weights in (0, 1) ``[B, H, T, 1]`` and log-decays ``[B, H, T]``."""
    q, k, v, b, g = tensors(*((batch, heads, length, d) for d in (dim, dim, v_dim, 1, 1)))
    return q, F.normalize(k, dim=-1), v, torch.sigmoid(b), F.logsigmoid(g[..., 0] + 1)


def layer(arm, heads=2, head_dim=4, head_v_dim=6, hidden_size=16):
    return ARMS[arm].build(hidden_size, heads, head_dim, head_v_dim).double()


def outer(x, y):
    return x[..., :, None] * y[..., None, :]


def moments(k, b, decay):
    """``S_t = sum_j decay_tj b_j k_j k_j^T``: ``[B, H, T, D, D]``."""
    return torch.einsum("...tj,...ja,...jb->...tab", decay.expand(*k.shape[:-1], -1), b * k, k)


# Mixers.


@pytest.mark.parametrize("gated", [False, True])
def test_delta_rule_is_its_recurrence(gated):
    q, k, v, beta, g = sequence()
    g = g if gated else torch.zeros_like(g)
    eye, P, expected = torch.eye(4, dtype=q.dtype), torch.zeros(2, 2, 4, 3, dtype=q.dtype), []
    for t in range(q.shape[2]):
        kt, bt = k[:, :, t], beta[:, :, t, :, None]
        P = g[:, :, t, None, None].exp() * (eye - bt * outer(kt, kt)) @ P + bt * outer(kt, v[:, :, t])
        expected.append((q[:, :, t, None] @ P)[:, :, 0])
    decay = mixers.decay_matrix(g if gated else None, q)
    mix = layer("GatedDeltaNet" if gated else "DeltaNet", head_v_dim=3).mix
    torch.testing.assert_close(mix(q, k, v, decay, beta=beta), torch.stack(expected, 2))


def test_neumann_series_of_all_terms_is_the_delta_rule():
    q, k, v, beta, g = sequence(length=6)
    decay = mixers.decay_matrix(g, q)
    expected = mixers.delta_rule(q, k, v, decay, beta)

    def series(order):
        mixer = mixers.NeumannDeltaRule(16, 2, None, 4, order=order, own_size=True).double()
        return mixer.mix(q, k, v, decay, beta)

    torch.testing.assert_close(series(6), expected)
    errors = [(series(order) - expected).abs().max() for order in (2, 4, 5)]
    assert min(errors) > 1e-6  # each term counts


def test_exact_solves_with_the_moments_and_so_does_its_gradient():
    q, k, _, b, g = sequence()
    ridge = 0.2 + torch.rand_like(b)
    decay = mixers.decay_matrix(g, q)
    matrix = moments(k, b, decay) + ridge[..., None] * torch.eye(4, dtype=q.dtype)
    x = mixers.solve(q, k, b, ridge, decay, iterations=mixers.SOLVER_STEPS)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, q))

    q, k, _, b, g = sequence(length=4, dim=3, batch=1, heads=1)
    inputs = [y.requires_grad_() for y in (q, k, b, 0.5 + torch.rand_like(b), g)]
    assert torch.autograd.gradcheck(
        lambda q, k, b, ridge, g: mixers.solve(q, k, b, ridge, mixers.decay_matrix(g, q), iterations=8), inputs
    )


def test_the_query_side_reads_the_solution():
    """``exact``: ridge regression of the values on the keys, weighted by sigmoid(b_proj) and the decay."""
    q, k, v, b, g = sequence()
    decay = mixers.decay_matrix(g, q)
    mixer = layer("exact", head_v_dim=3)
    logits = torch.logit(b)
    matrix = moments(k, b, decay) + torch.eye(4, dtype=q.dtype)  # the ridge starts at 1
    P = torch.einsum("...tj,...ja,...jc->...tac", decay, k, b * v)
    expected = torch.einsum("...ta,...tac->...tc", torch.linalg.solve(matrix, q), P)
    torch.testing.assert_close(mixer.mix(q, k, v, decay, b_proj=logits), expected)


def thetas(k, b, ridge, decay, count):
    nodes = torch.sigmoid(mixers.start_nodes(count, "chebyshev", 1.0).double())
    trace = moments(k, b, decay).diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    torch.testing.assert_close(mixers.running_weight(k, b, decay), trace)
    return [ridge + node * trace for node in nodes]


def test_more_readings_come_closer_to_the_solution():
    q, k, _, b, g = sequence(length=16)
    ridge, decay = torch.ones_like(b), mixers.decay_matrix(g, q)
    exact = torch.linalg.solve(moments(k, b, decay) + torch.eye(4, dtype=q.dtype), q)
    errors = []
    for readings in (2, 4, 8, 16):
        x = mixers.iterate(q, k, b * k, ridge, decay, thetas(k, b, ridge, decay, readings + 1))
        errors.append(((x - exact).norm() / exact.norm()).item())
    assert all(later < 0.5 * earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 1e-5, errors


def test_what_is_left_is_the_product_over_the_nodes():
    """``(S + lambda I) x = (I - prod_n (I - (S + lambda I) / theta_n)) y``, one factor per node."""
    q, k, _, b, g = sequence()
    ridge, decay = 0.3 + b, mixers.decay_matrix(g, q)
    theta = thetas(k, b, ridge, decay, 4)
    matrix = moments(k, b, decay) + ridge[..., None] * torch.eye(4, dtype=q.dtype)
    left = q[..., None]
    for node in theta:
        left = left - matrix @ left / node[..., None]
    x = mixers.iterate(q, k, b * k, ridge, decay, theta)
    torch.testing.assert_close((matrix @ x[..., None]), q[..., None] - left)


@pytest.mark.parametrize("reach", [1.0, 0.3])
@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_start_nodes_are_roots_of_chebyshevs_polynomial(count, reach):
    nodes = torch.sigmoid(mixers.start_nodes(count, "chebyshev", reach).double()).numpy()
    on_unit = 2 * nodes / reach - 1
    assert numpy.abs(numpy.polynomial.Chebyshev.basis(count)(on_unit)).max() < 1e-4
    assert len(set(on_unit.round(4))) == count and abs(on_unit).max() < 1
    middle = torch.sigmoid(mixers.start_nodes(count, "richardson", reach))
    torch.testing.assert_close(middle, torch.full((count,), reach / 2))


def test_key_side_takes_away_what_earlier_keys_span():
    """Many readings leave ``k~_j = lambda (S_{j-1} + lambda I)^{-1} k_j``."""
    q, k, v, b, g = sequence()
    mixer = mixers.MomentPolynomial(16, 2, None, 4, head_v_dim=3, key=24).double()
    decay = mixers.decay_matrix(g, q)
    earlier = moments(k, b, decay.tril(-1)) + torch.eye(4, dtype=q.dtype)
    keys = torch.linalg.solve(earlier, k)
    expected = mixers.read(q, keys, b * v, decay)
    torch.testing.assert_close(mixer.mix(q, k, v, decay, b_proj=torch.logit(b)), expected, rtol=1e-5, atol=1e-6)


def test_published_hla3_is_the_product_of_moments_less_its_corrections():
    """``F_t = S Q P - G1 - G2 - G3`` with ``S = sum k k^T, Q = sum q q^T, P = sum k v^T``: the paper's Theorem 7.1."""
    q, k, v, _, _ = sequence()
    S = Q = torch.zeros(2, 2, 4, 4, dtype=q.dtype)
    P = G = torch.zeros(2, 2, 4, 3, dtype=q.dtype)
    expected = []
    for t in range(q.shape[2]):
        qt, kt, vt = q[:, :, t], k[:, :, t], v[:, :, t]
        G = G + outer(kt, kt) @ Q @ P + S @ outer(qt, qt) @ P + S @ Q @ outer(kt, vt)
        S, Q, P = S + outer(kt, kt), Q + outer(qt, qt), P + outer(kt, vt)
        expected.append((qt[..., None, :] @ (S @ Q @ P - G))[..., 0, :])
    mix = layer("hla3 published", head_v_dim=3).mix
    torch.testing.assert_close(mix(q, k, v, mixers.decay_matrix(None, q)), torch.stack(expected, 2))


@pytest.mark.parametrize("norm", ["l2", "count"])
def test_normalised_keys(norm):
    """With one-hot queries at the end and values one-hot in time, the outputs are the transformed keys themselves."""
    length, dim = 12, 4
    q, k, _, _, g = sequence(length=length, dim=dim)
    q[:, :, -dim:] = torch.eye(dim, dtype=q.dtype)
    decay = mixers.decay_matrix(None, q)
    mixer = mixers.NormalisedKeys(16, 2, None, dim, head_v_dim=length, inner="k", norm=norm).double()
    o = mixer.mix(q, k, torch.eye(length, dtype=q.dtype).expand(2, 2, -1, -1), decay)
    keys = o[:, :, -dim:, :-dim].mT
    if norm == "l2":
        torch.testing.assert_close(keys.norm(dim=-1), torch.ones_like(keys[..., 0]))
    S = moments(k, torch.ones_like(k[..., :1]), decay)
    raw = (S @ k[..., None])[..., 0][:, :, :-dim]
    scale = raw.norm(dim=-1) if norm == "l2" else S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, :, :-dim]
    torch.testing.assert_close(keys, raw / scale[..., None])


def test_overwriting_of_own_size_is_two_terms_of_the_delta_rule():
    """``v~_j = beta_j v_j - beta_j P_{j-1}^T k_j`` with P of the weighted values; the output norm takes scales away."""
    options = {"own_size": True, "norm_eps": 1e-14}
    ours = mixers.WriteGated(16, 2, None, 4, op="ahla", keys=False, **options).double()
    series = mixers.NeumannDeltaRule(16, 2, None, 4, order=2, **options).double()
    series.load_state_dict({**ours.state_dict(), "log_b": series.log_b})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], series(x)[0])


def test_weights_of_tokens():
    """``beta`` weighs ``k k^T`` and ``v``."""
    mixer, x = layer("both, weighted"), torch.randn(2, 5, 16, dtype=torch.float64)
    beta = torch.sigmoid(mixer.beta_proj(x))[..., None, None]
    arguments = (x, None, None, None, None, False)
    q, k, v, p, _ = mixer._project(*arguments)
    plain_q, plain_k, plain_v, plain_p, _ = HigherOrderLinearAttention._project(mixer, *arguments)
    assert torch.equal(q, plain_q) and p == plain_p == "k"
    torch.testing.assert_close(outer(k, k), beta * outer(plain_k, plain_k))
    torch.testing.assert_close(v, beta[..., 0] * plain_v)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_causal_and_learns_with_all_its_parameters(name):
    mixer = layer(name)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    y = mixer(x)[0]
    assert y.shape == x.shape and y.isfinite().all()

    y.square().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all() and grad.any(), parameter_name

    t = 7
    changed = x.clone()
    changed[:, t] += torch.randn(2, 16, dtype=torch.float64)
    with torch.no_grad():
        difference = (mixer(changed)[0] - mixer(x)[0]).abs()
    assert difference[:, :t].max() < 1e-12
    assert (difference[:, t:].amax(-1) > 1e-9).all()  # so what comes before could have changed


def test_only_arms_that_say_so_have_a_decay():
    """Whatever the layer's own default is."""
    for name in ARMS:
        for mixer in layer(name).modules():
            if isinstance(mixer, HigherOrderLinearAttention):
                assert mixer.decay == ("token" if name.endswith(", gate") or "Gated" in name else "none"), name


def test_decay_reaches_every_arm_that_has_one():
    """With a decay to nothing, an output is that of its token and of what the convolution still sees, alone."""
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    for name in [name for name in ARMS if name.endswith(", gate") or name == "GatedDeltaNet"]:
        mixer = layer(name)
        with torch.no_grad():
            mixer.dt_bias.fill_(50.0)
            mixer.A_log.fill_(3.0)
            difference = (mixer(x)[0] - mixer(torch.cat([torch.zeros_like(x[:, :3]), x[:, 3:]], 1))[0]).abs()
        assert difference[:, 6:].max() < 1e-12 < difference[:, :6].max(), name


@pytest.mark.parametrize(
    ("arm", "operator"),
    [
        ("linear", 4 * 6),
        ("hla2", 10 + 4 * 6),
        ("ahla", 2 * 4 * 6),
        ("hla3", 10 + 2 * 4 * 6),
        ("DeltaNet", 4 * 6),
        ("GatedDeltaNet", 4 * 6),
        ("Neumann 3", 3 * 4 * 6),
        ("query 4", 10 + 4 * 6 + 1),
        ("exact", 10 + 4 * 6),
        ("hla3 published", 2 * 10 + 3 * 4 * 6),
        ("protecting, own S", 10 + 4 * 6),
    ],
)
def test_state_numbers(arm, operator):
    """Two heads of 4 x 6, a symmetric 4 x 4 has 10 numbers; the convolution keeps 3 inputs of q, k and v."""
    assert mixers.state_numbers(layer(arm)) == 2 * operator + 3 * 2 * (4 + 4 + 6)


def test_state_numbers_of_other_layers():
    assert mixers.state_numbers(layer("softmax")) is None
    assert mixers.state_numbers(layer("hla2, p=proj")) == 2 * (10 + 24) + 3 * 2 * (4 + 4 + 6 + 4)
    assert mixers.state_numbers(layer("linear + both")) == (24 + 3 * 14) + (10 + 2 * 24 + 3 * 14)
    bare = HigherOrderLinearAttention(16, 2, None, 4, op="linear_attn", conv_size=0)
    assert mixers.state_numbers(bare) == 2 * 4 * 4


def test_equal_state_is_equal():
    def numbers(entry):
        return mixers.state_numbers(ARMS[entry.arm].build(64, entry.heads, entry.head_dim, entry.head_v_dim))

    wanted = 32 * 32 + 3 * 3 * 32  # GatedDeltaNet of 32 x 32
    found = {(e.arm, e.head_dim, e.head_v_dim): numbers(e) for e in state_track()}
    assert found["GatedDeltaNet", 32, 32] == wanted
    assert {key: x for key, x in found.items() if abs(x - wanted) > 0.05 * wanted} == {}


def test_equal_width_is_equal():
    """All arms of the width track have the parameters of softmax within a hundredth, in the skeleton of the runs."""
    embedding = 8192 * 64
    numbers = {
        e.arm: 2 * sum(p.numel() for p in ARMS[e.arm].build(64, e.heads, e.head_dim, e.head_v_dim).parameters())
        for e in width_track()
    }
    assert {n: x for n, x in numbers.items() if abs(x - numbers["softmax"]) > 0.01 * embedding} == {}


def test_the_public_operator_is_the_query_side_on_trial():
    """hla_q in chunks and "query 4, token ridge" as explicit matrices are one mixer (nodes come in another order)."""
    ours, trial = (layer(name, heads=1) for name in ("hla_q, gate", "query 4, token ridge, gate"))
    names = {"b_proj.weight": "write_proj.weight", "log_lambda": "ridge_head", "query_nodes": "node_logits"}
    values = ours.state_dict()
    trial.load_state_dict({name: values[names.get(name, name)] for name in trial.state_dict()})
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    torch.testing.assert_close(trial(x)[0], ours(x)[0], rtol=1e-7, atol=1e-9)
