"""The fused head and cross-entropy equal F.cross_entropy in float64, and so do their gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

import hla.loss
from hla.loss import summed_cross_entropy
from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels import cross_entropy as kernels
from hla.kernels.cross_entropy import cross_entropy_

N, D, V = 37, 24, 301
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list:
    """Logits the kernel was given, of which a row is several blocks, and whether it was to write their gradient."""
    calls = []
    monkeypatch.setattr(kernels, "COLUMNS", 128)
    monkeypatch.setattr(hla.loss, "_has_kernel", lambda x: True)

    def noted(logits, targets, losses, gradient):
        assert len(logits._base) == (calls[0][0][0] if calls else len(logits))  # memory of one piece, the largest
        calls.append((tuple(logits.shape), logits.dtype, gradient))
        cross_entropy_(logits, targets, losses, gradient)

    monkeypatch.setattr(kernels, "cross_entropy_", noted)
    return calls


def example(dtype=torch.float32) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[[0, 11, 36]] = torch.tensor([-100, 0, V - 1])
    return hidden, torch.nn.Linear(D, V, bias=False).to(dtype), targets


def truth(hidden, head, targets, factor=1.0) -> list[torch.Tensor]:
    """Loss, and the gradients of hidden and weight."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, head.weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    return [loss, *torch.autograd.grad(loss * factor, [hidden, weight])]


@pytest.mark.parametrize("needed", ["hidden weight", "hidden", "weight"])
@pytest.mark.parametrize("rows", [N, 16, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_and_gradients(dtype, rows, needed, calls, monkeypatch):
    monkeypatch.setattr(hla.loss, "LOGITS_BYTES", rows * V * dtype.itemsize)
    hidden, head, targets = example(dtype)
    hidden.requires_grad_("hidden" in needed)
    head.weight.requires_grad_("weight" in needed)
    loss = summed_cross_entropy(hidden, head, targets)
    products = []
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a))
    (0.37 * loss).backward()
    assert not products  # (the gradients were there)
    assert calls == [((min(rows, N - begin), V), dtype, True) for begin in range(0, N, rows)]
    expected = truth(hidden, head, targets, 0.37)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss, expected[0], TOLERANCE[dtype], "loss")
    for x, dx, name in zip((hidden, head.weight), expected[1:], ("hidden", "weight"), strict=True):
        assert (x.grad is not None) == (name in needed)
        if x.grad is not None:
            assert x.grad.dtype == dtype
            assert_close(x.grad, dx, TOLERANCE[dtype], name)
    if hidden.grad is not None:
        assert not hidden.grad[0].any()  # the token that counts not


def test_autocast_decides_the_dtype_of_the_logits_alone(calls):
    hidden, head, targets = example()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = summed_cross_entropy(hidden, head, targets)
    loss.backward()
    assert calls == [((N, V), torch.bfloat16, True)]
    assert loss.dtype == hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    for x, y in zip((loss, hidden.grad, head.weight.grad), truth(hidden, head, targets), strict=True):
        assert_close(x, y, TOLERANCE[torch.bfloat16])


def test_pieces_are_whole_tiles_of_the_products(calls, monkeypatch):
    monkeypatch.setattr(hla.loss, "LOGITS_BYTES", 300 * 20 * 4)
    with torch.no_grad():
        summed_cross_entropy(torch.randn(600, 4), torch.nn.Linear(4, 20, bias=False), torch.randint(20, (600,)))
    assert [shape[0] for shape, *_ in calls] == [256, 256, 88]


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_without_gradients_nothing_is_done_for_them(how, calls):
    hidden, head, targets = example()
    if how == "frozen":
        hidden, head = hidden.detach(), head.requires_grad_(False)
    with torch.set_grad_enabled(how == "frozen"):
        loss = summed_cross_entropy(hidden, head, targets)
    assert not loss.requires_grad and calls == [((N, V), torch.float32, False)]
    expected = F.cross_entropy(hidden.double() @ head.weight.double().T, targets, reduction="sum")
    assert_close(loss, expected, 1e-6)


def test_the_same_backward_pass_twice():
    hidden, head, targets = example()
    loss = summed_cross_entropy(hidden, head, targets)
    first, second = (torch.autograd.grad(2 * loss, [hidden, head.weight], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_gradient_of_the_gradient_is_refused():
    hidden, head, targets = example()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(summed_cross_entropy(hidden, head, targets), hidden, create_graph=True)


def test_no_tokens():
    hidden, head, targets = torch.randn(0, D, requires_grad=True), torch.nn.Linear(D, V, bias=False), torch.ones(0)
    loss = summed_cross_entropy(hidden, head, targets.long())
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, D) and not head.weight.grad.any()


# ----------------------------------------------------------------------------------------------------- the kernel alone


def both(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradients of rows."""
    losses, logits = torch.empty(len(logits)), logits.clone()
    cross_entropy_(logits, targets, losses, True)
    return losses, logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 130, V - 1])
def test_what_is_not_finite_stays_so(column, value):
    logits = torch.randn(2, V)
    logits[1, column] = value
    for target in (3, column):
        losses, gradient = both(logits, torch.tensor([3, target]))
        assert losses.isfinite().tolist() == [True, False]
        assert gradient[0].isfinite().all() and gradient[1].isnan().any()


def test_columns_of_minus_infinity_have_no_share():
    logits, targets = torch.randn(3, V), torch.tensor([V - 1, V - 1, 2])
    logits[0, : V - 9], logits[1, 5:290], logits[2, 1] = (-math.inf,) * 3  # (among them the whole of the first block)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    losses, gradient = both(logits, targets)
    assert_close(losses, expected, 1e-6)
    assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0], 1e-6)
    assert both(torch.full((1, V), -math.inf), targets[:1])[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits(dtype):
    logits, targets = (1e4 * torch.randn(6, V)).to(dtype), torch.randint(V, (6,))
    for row, sign in ((4, 1), (5, -1)):  # a sum of many, which the size of the logits must not blur
        logits[row] = torch.linspace(sign * 1e4, sign * 1e4 + 8, V)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    losses, gradient = both(logits, targets)
    assert_close(losses[:4], expected[:4], 1e-6)
    assert_close(losses[4:], expected[4:], 1e-6)
    assert gradient.dtype == dtype
    assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0], TOLERANCE[dtype] / 2)


@pytest.mark.parametrize("target", [-1, -101, V, 1 << 40])
def test_a_target_that_is_no_column_has_no_loss(target):
    assert both(torch.randn(1, V), torch.tensor([target]))[0].isnan().all()


# ----------------------------------------------------------------------------------------------------- what it leaves


class Adapter(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def changed(head: torch.nn.Linear, how: str) -> torch.nn.Linear:
    if how == "bias":
        return torch.nn.Linear(D, V)
    if how == "adapter":
        return Adapter(D, V, bias=False)
    if how == "double":
        return head.double()
    if how == "forward":
        head.forward = lambda x: 2 * F.linear(x, head.weight)
    elif how == "hook":
        head.register_forward_hook(lambda module, args, y: 2 * y)
    elif how == "pre-hook":
        head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif how == "backward hook":
        head.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
    elif how == "backward pre-hook":
        head.register_full_backward_pre_hook(lambda module, dy: (2 * dy[0],))
    elif how == "FSDP":
        head._is_fsdp_managed_module = True
    elif how == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(head)
    return head


HOWS = ("bias", "adapter", "double", "forward", "hook", "pre-hook", "backward hook", "backward pre-hook", "FSDP")


@pytest.mark.parametrize("how", [*HOWS, "parametrized"])
def test_a_head_that_is_more_than_a_matrix_is_called(how, calls, monkeypatch):
    monkeypatch.setattr(hla.loss, "LOGITS_BYTES", 16 * V * 4)
    hidden, head, targets = example(torch.float64 if how == "double" else torch.float32)
    head = changed(head, how)
    found = torch.autograd.grad(summed_cross_entropy(hidden, head, targets), [hidden, *head.parameters()])
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    for x, y in zip(found, torch.autograd.grad(expected, [hidden, *head.parameters()]), strict=True):
        assert_close(x, y, 1e-5)
    assert not calls


def test_fsdp_marks_the_head_that_it_moves():
    """A name of PyTorch's own, which `_fuses` reads: the head itself has no hooks, and its weight is plain."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(D, V, bias=False))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.unshard()
        head = model[0]
        assert type(head.weight) is torch.nn.Parameter and not (head._forward_hooks or head._forward_pre_hooks)
        assert not hla.loss._fuses(torch.randn(N, D), head, torch.zeros(N, dtype=torch.long))
    finally:
        dist.destroy_process_group()


def test_compiled_the_head_is_called(calls):
    hidden, head, targets = example()
    loss = torch.compile(summed_cross_entropy, backend="eager", fullgraph=True)(hidden, head, targets)
    assert not calls
    assert_close(loss, truth(hidden, head, targets)[0], 1e-6)
