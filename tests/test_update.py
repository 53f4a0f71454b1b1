"""Clipping and the step: fused (the device decides) and not (the host does) are the same."""

import math

import pytest
import torch

from hla.update import clip_and_step

GROUPS = [(3, 5), (7,)]  # a parameter each, the second one without weight decay


def steps(fused: bool, gradients: list[list[torch.Tensor]], losses: list[float], clip: float):
    """(norms, weights after each step, how often the optimizer has counted)."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in GROUPS]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, fused=fused)
    norms, weights = [], []
    for grads, loss in zip(gradients, losses, strict=True):
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad.clone()
        norms.append(clip_and_step(optimizer, clip, torch.tensor([loss, 1.0])))
        weights.append([p.detach().clone() for p in parameters])
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    return norms, weights, [int(optimizer.state[p]["step"]) for p in parameters]


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_it_clips_and_steps(clip):
    torch.manual_seed(1)
    gradients = [[torch.randn(shape) * size for shape in GROUPS] for size in (1, 10, 0.01)]
    norms, weights, counted = steps(True, gradients, [1.0] * 3, clip)
    assert [float(n) for n in norms] == pytest.approx(
        [math.sqrt(sum(float(x.square().sum()) for x in grads)) for grads in gradients]
    )
    plain_norms, plain, plainly_counted = steps(False, gradients, [1.0] * 3, clip)
    assert counted == plainly_counted == [3, 3] and norms == plain_norms
    for one, other in zip(weights, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def moved_by_hand(p, grad):  # the first step of AdamW has the size of the rate, unless eps is seen
        grad = grad * min(1.0, clip / (float(norms[0]) + 1e-6))
        return p - 0.1 * grad / (grad.abs() + 1e-8)

    torch.manual_seed(0)
    first = torch.randn(GROUPS[0]) * (1 - 0.1 * 0.5)
    torch.testing.assert_close(weights[0][0], moved_by_hand(first, gradients[0][0]))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("broken", ["loss", "gradient", "infinite gradient"])
def test_what_is_not_finite_changes_nothing(broken, fused):
    torch.manual_seed(1)
    gradients = [[torch.randn(shape) for shape in GROUPS] for _ in range(3)]
    losses = [1.0, math.nan if broken == "loss" else 1.0, 1.0]
    if broken != "loss":
        gradients[1][1][2] = math.nan if broken == "gradient" else math.inf
    norms, weights, counted = steps(fused, gradients, losses, 1.0)
    assert all(map(torch.equal, weights[0], weights[1])) and counted == [2, 2]
    assert bool(norms[1].isfinite()) == (broken == "loss")
    _, without, _ = steps(fused, gradients[::2], losses[::2], 1.0)
    assert all(map(torch.equal, weights[2], without[1]))  # as if it had never been


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_other_dtypes(dtype):
    weights = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
        p.grad = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=dtype)
        assert clip_and_step(optimizer, 1.0, torch.ones(())).item() == pytest.approx(math.sqrt(30), rel=1e-2)
        weights.append(p.detach())
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("how", ["a group", "loaded", "SGD"])
def test_what_is_not_all_fused_adam_is_decided_by_the_host(how):
    p, other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    kind = torch.optim.SGD if how == "SGD" else torch.optim.AdamW
    groups = [{"params": [p]}, {"params": [other], "fused": how != "a group"}]
    optimizer = kind(groups, lr=0.1, fused=True, **({"momentum": 0.9} if how == "SGD" else {}))
    if how == "loaded":  # from a run whose optimizer was not fused
        optimizer.load_state_dict(kind([{"params": [p]}, {"params": [other]}], lr=0.1).state_dict())
    p.grad = torch.full((4,), math.nan)
    clip_and_step(optimizer, 1.0, torch.ones(()))
    assert torch.equal(p.detach(), torch.ones(4))
    p.grad = torch.ones(4)
    clip_and_step(optimizer, 1.0, torch.ones(()))
    assert bool(p.detach().isfinite().all()) and float(p.detach()[0]) < 1
