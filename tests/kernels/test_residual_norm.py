"""The norm kernel equals the operations it replaces, alone, with a branch, and inside a block; so do all gradients."""

import copy

import pytest
import torch

from hla import HLAConfig
from hla.models import HLAForCausalLM, modeling_hla
from hla.models.modeling_hla import HLABlock
from hla.norm import RMSNorm
from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels import residual_norm as kernels


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "NUMBERS", 128)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    monkeypatch.setattr(kernels, "STEPS", 3)


def plain(x, branch, weight, eps):
    s = x if branch is None else x + branch
    return s, s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("read", ["both", "s", "y"])
@pytest.mark.parametrize("branch", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("rows,D", [(1, 64), (37, 48), (64, 17)])
def test_values_and_gradients(rows, D, branch, read):
    torch.manual_seed(rows + D)
    x, weight = torch.randn(1, rows, D), torch.rand(D) + 0.5
    b = None if branch is None else torch.randn(1, rows, D).to(branch)
    given = [t.requires_grad_() for t in (x, b, weight) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    results = kernels.residual_norm(x, b, weight, 1e-3, torch.float32)
    expected = plain(exact[0], None if b is None else exact[1], exact[-1], 1e-3)
    chosen = {"both": (0, 1), "s": (0,), "y": (1,)}[read]
    up = [torch.randn(1, rows, D) for _ in chosen]
    used = given if 1 in chosen else given[:-1]
    found = torch.autograd.grad([results[i] for i in chosen], used, up)
    truth = torch.autograd.grad([expected[i] for i in chosen], exact[: len(used)], [u.double() for u in up])
    for name, y, z in zip("sy", results, expected, strict=True):
        assert_close(y, z, 1e-6, name)
    for y, z, t in zip(found, truth, used, strict=True):
        assert y.dtype == t.dtype
        assert_close(y, z, 1e-3 if t.dtype == torch.float16 else 1e-5, f"gradient of {list(t.shape)}")


def test_dtypes_are_those_of_the_operations():
    x, half = torch.randn(3, 32), torch.randn(3, 32, dtype=torch.float16)
    weight = torch.ones(32)
    assert [t.dtype for t in kernels.residual_norm(x, half, weight, 1e-6, torch.bfloat16)] == [x.dtype, torch.bfloat16]
    assert [t.dtype for t in kernels.residual_norm(half, half, weight, 1e-6, half.dtype)] == [half.dtype] * 2
    s, y = kernels.residual_norm(half, half, weight, 1e-6, torch.float32)
    assert torch.equal(s, half + half)
    assert_close(y, plain(s.double(), None, weight, 1e-6)[1], 1e-6, "the norm of the rounded sum")


def test_one_gradient_for_two_summands_of_one_dtype():
    x, b = (torch.randn(5, 32, requires_grad=True) for _ in range(2))
    s, y = kernels.residual_norm(x, b, torch.ones(32), 1e-6, torch.float32)
    (s * y).sum().backward()
    assert torch.equal(x.grad, b.grad)
    assert x.grad.data_ptr() != b.grad.data_ptr()


def test_no_double_backward():
    x = torch.randn(2, 32, requires_grad=True)
    y = kernels.residual_norm(x, None, torch.ones(32), 1e-6, torch.float32)[1]
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("layer", ["linear_attention", "full_attention"])
def test_a_block_is_the_same_block(layer, monkeypatch):
    torch.manual_seed(0)
    config = HLAConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, layer_types=[layer]
    )  # fmt: skip
    block = HLABlock(config, 0)
    with torch.no_grad():
        for p in block.parameters():
            p += 0.1 * torch.randn_like(p)
    x, dy = torch.randn(2, 19, 48), torch.randn(2, 19, 48)
    cos_sin = (torch.ones(1, 19, 1, 8), torch.zeros(1, 19, 1, 8))

    def results(block):
        found = x.to(next(block.parameters()).dtype).requires_grad_()
        y = block(found, cos_sin=tuple(t.to(found.dtype) for t in cos_sin))
        used = dict(block.named_parameters())
        return dict(
            zip(["y", "x", *used], [y, *torch.autograd.grad(y, [found, *used.values()], dy.to(y.dtype))], strict=True)
        )

    truth = results(copy.deepcopy(block).double())
    calls = []
    monkeypatch.setattr(kernels, "launch", lambda *a, f=kernels.launch, **k: (calls.append(a[0]), f(*a, **k)))
    monkeypatch.setattr(RMSNorm, "_in_kernel", lambda *_: True)
    found = results(block)
    assert calls.count(kernels._add_norm) >= 2 and calls.count(kernels._add_norm_gradient) >= 2
    for name in truth:
        assert_close(found[name], truth[name], 2e-5, name)


def test_hooks_of_a_norm_still_run(monkeypatch):
    monkeypatch.setattr(RMSNorm, "_in_kernel", lambda *_: True)
    norm, seen = RMSNorm(32, eps=1e-6), []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 32)
    s, y = norm.residual(x, x)
    assert seen[0] is y and torch.equal(s, x + x)


@pytest.mark.parametrize("how", ["replaced", "backward", "before backward", "all modules"])
def test_a_norm_around_which_more_happens_is_called(how, monkeypatch, request):
    """As by accelerate, which brings the weight to the device for the time of a call."""
    monkeypatch.setattr(RMSNorm, "_in_kernel", lambda *_: True)
    monkeypatch.setattr(RMSNorm, "_residual_norm", None)
    norm, x = RMSNorm(32, eps=1e-6), torch.randn(2, 32)
    assert norm.is_bare()
    if how == "replaced":
        norm.forward = lambda y: y + 1
    else:
        monkeypatch.setattr(RMSNorm, "_in_kernel", lambda self, y: self.is_bare())
        if how == "backward":
            handle = norm.register_full_backward_hook(lambda *_: None)
        elif how == "before backward":
            handle = norm.register_full_backward_pre_hook(lambda *_: None)
        else:
            handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        request.addfinalizer(handle.remove)
    s, y = norm.residual(x, x)
    assert torch.equal(s, x + x) and (how != "replaced" or torch.equal(y, s + 1))


@pytest.mark.parametrize("how", ["plain", "hooked", "hidden states", "recomputed", "one recomputed", "inference"])
def test_blocks_leave_their_last_sum_to_the_next_norm(how, monkeypatch):
    torch.manual_seed(0)
    config = HLAConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = HLAForCausalLM(config).train(how != "inference")
    if how == "recomputed":
        model.gradient_checkpointing_enable()
    if how == "one recomputed":
        model.gradient_checkpointing_enable()
        model.model.gradient_checkpointing = False
    ids = torch.randint(50, (2, 9))

    def results(model):
        out = model(ids, labels=ids, output_hidden_states=how == "hidden states", use_cache=False)
        return [out.loss, *(out.hidden_states or ()), *torch.autograd.grad(out.loss, model.parameters())]

    truth = results(copy.deepcopy(model).double())
    outputs = []
    inner = HLABlock.forward  # (which a hook of a block keeps from leaving anything)
    monkeypatch.setattr(
        HLABlock, "forward", lambda *args, **options: (outputs.append(type(y := inner(*args, **options))), y)[1]
    )
    if how == "hooked":
        model.model.layers[1].register_forward_hook(lambda block, args, output: output + 0)
    monkeypatch.setattr(RMSNorm, "_in_kernel", lambda *_: True)
    monkeypatch.setattr(modeling_hla, "has_kernels", lambda *_: True)
    found = results(model)
    assert outputs[:3] == [tuple if how == "plain" else torch.Tensor] * 3
    for a, b in zip(found, truth, strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize("how", ["wrapped", "extended"])
def test_what_stands_in_the_place_of_a_block_sees_its_output(how, monkeypatch):
    class Wrapper(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, **options):
            return 2 * self.block(x, **options)

    class Extended(HLABlock):
        def forward(self, *args, **options):
            return 2 * super().forward(*args, **options)

    config = HLAConfig(vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
    model, ids = HLAForCausalLM(config).train(), torch.randint(50, (2, 9))
    layers = model.model.layers
    if how == "wrapped":
        layers[0] = Wrapper(layers[0])
    else:
        layers[0].__class__ = Extended
    expected = model(ids).logits
    monkeypatch.setattr(modeling_hla, "has_kernels", lambda *_: True)
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("which", ["input_layernorm", "post_attention_layernorm", "norm"])
def test_a_norm_in_whose_place_something_else_stands_is_called(which):
    """As adapters wrap it (which pass on what they do not have themselves)."""

    class Wrapper(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.inner = norm

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x):
            return 3 * self.inner(x)

    torch.manual_seed(0)
    config = HLAConfig(vocab_size=50, hidden_size=48, num_hidden_layers=1, num_attention_heads=3)
    model, ids = HLAForCausalLM(config).eval(), torch.randint(50, (2, 9))
    owner = model.model if which == "norm" else model.model.layers[0]
    with torch.no_grad():
        wrapped = copy.deepcopy(model)
        getattr(owner, which).weight *= 3
        owner = wrapped.model if which == "norm" else wrapped.model.layers[0]
        setattr(owner, which, Wrapper(getattr(owner, which)))
        torch.testing.assert_close(wrapped(ids).logits, model(ids).logits)


def test_a_model_in_training_generates_without_gradients(monkeypatch):
    """A block then is one launch per token, which leaves nothing to a next norm."""
    config = HLAConfig(vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
    model = HLAForCausalLM(config).train()
    outputs, inner = [], HLABlock.forward
    monkeypatch.setattr(
        HLABlock, "forward", lambda *args, **options: (outputs.append(type(y := inner(*args, **options))), y)[1]
    )
    monkeypatch.setattr(modeling_hla, "has_kernels", lambda *_: True)
    with torch.no_grad():
        model(torch.randint(50, (2, 1)), use_cache=True)
    assert outputs == [torch.Tensor] * 2
