"""The kernel of rotary embeddings equals `apply_rope` of q and of k, and so do its gradients and softmax attention."""

import pytest
import torch

from hla.models import HLACache, HLAConfig, HLAForCausalLM
from hla.models.modeling_hla import HLAAttention
from hla.rotary import apply_rope, rope_cos_sin
from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels import rotary
from hla.kernels.rotary import fits, rotated


def turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


def results(function, qkv: torch.Tensor, heads: tuple, positions: torch.Tensor, douts: list) -> list[torch.Tensor]:
    """q, k and the gradient of what they are parts of."""
    qkv = qkv.detach().requires_grad_()
    q, k, _ = qkv.split(heads, 2)
    cos_sin = rope_cos_sin(positions, qkv.shape[3], 10_000.0, qkv.dtype)
    assert function is turned or fits(q, k, *cos_sin)
    outputs = function(q, k, *cos_sin)
    return [*outputs, *torch.autograd.grad(outputs, qkv, [x.to(qkv.dtype) for x in douts])]


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were launched."""
    seen: list[str] = []
    monkeypatch.setattr(rotary, "launch", lambda *a, f=rotary.launch, **k: (seen.append(a[0].__name__), f(*a, **k)))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("each", [False, True], ids=["positions of all", "positions of each"])
@pytest.mark.parametrize("D,HQ,HKV", [(16, 4, 2), (64, 3, 3), (96, 6, 1), (128, 2, 2), (2, 5, 1), (256, 2, 1)])
def test_rotation_and_gradient(D, HQ, HKV, each, dtype, launches, monkeypatch):
    monkeypatch.setattr(rotary, "PAIRS", 256)  # several programs along the sequence
    B, T, heads = 2, 37, (HQ, HKV, HKV)
    qkv = torch.randn(B, T, sum(heads), D).to(dtype)
    positions = torch.randint(0, 3000, (T, B if each else 1)).T  # (and so are the strides of cos and sin)
    # Gradients as attention gives them, heads before tokens, those of k broken up further.
    dq, dk = torch.randn(B, HQ, T, D).to(dtype).transpose(1, 2), torch.randn(B, T, HKV, 2 * D).to(dtype)[..., ::2]
    found = results(rotated, qkv, heads, positions, [dq, dk])
    assert launches == ["_rotate", "_rotate"]
    truth = results(turned, qkv.double(), heads, positions, [dq.double(), dk.double()])
    # The angles are of float32: what the positions lose there is compared with the same operations.
    plain = results(turned, qkv, heads, positions, [dq, dk])
    assert [x.is_contiguous() for x in found[:2]] == [True, True]
    step = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]  # (cut off here)
    for x, y, z in zip(found, plain, truth, strict=True):
        assert x.dtype == dtype
        assert_close(x, y, step)
        assert_close(x, z, max(step, 1e-3))


def test_gradient_of_one_alone():
    q, k = (torch.randn(2, 5, heads, 8, requires_grad=True) for heads in (3, 1))
    cos_sin = rope_cos_sin(torch.arange(5)[None], 8, 100.0, q.dtype)
    truth = torch.autograd.grad(turned(q, k, *cos_sin)[0].pow(3).sum(), q)
    found = torch.autograd.grad(rotated(q, k, *cos_sin)[0].pow(3).sum(), [q, k])
    assert_close(found[0], *truth, 1e-6)
    assert not found[1].any()
    assert_close(torch.autograd.grad(rotated(q, k.detach(), *cos_sin)[0].pow(3).sum(), q)[0], *truth, 1e-6)


def test_one_token_whose_strides_mean_nothing():
    """A dimension of size 1 may have any stride; others that are no multiples of the head size are copied."""
    q = torch.randn(30).as_strided((1, 1, 2, 6), (5, 3, 12, 1))
    k = torch.randn(1, 2, 1, 7)[..., :6][:, 1:]
    assert rotary._strided(q)[0] is q and rotary._strided(k)[0] is k
    cos_sin = rope_cos_sin(torch.tensor([[9]]), 6, 100.0, q.dtype)
    for x, y in zip(rotated(q, k, *cos_sin), turned(q, k, *cos_sin), strict=True):
        assert_close(x, y, 1e-6)
    q, k = torch.randn(2, 5, 3, 7)[..., :6], torch.randn(2, 5, 3, 7)[..., 1:]
    cos_sin = rope_cos_sin(torch.arange(5)[None], 6, 100.0, q.dtype)
    for x, y in zip(rotated(q, k, *cos_sin), turned(q, k, *cos_sin), strict=True):
        assert_close(x, y, 1e-6)


def test_what_it_does_not_take():
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    cos, sin = rope_cos_sin(torch.arange(5)[None], 8, 100.0, q.dtype)
    assert fits(q, k, cos, sin)
    assert not fits(q.double(), k.double(), cos, sin)
    assert not fits(q.half(), k, cos, sin)
    assert not fits(q, k, cos.double(), sin.double())
    assert not fits(q, k, cos, sin.clone().requires_grad_())
    assert not fits(q, k, cos[:, :1], sin[:, :1])
    assert not fits(q[:1], k[:1], cos.expand(2, -1, -1, -1), sin.expand(2, -1, -1, -1))
    assert not fits(q[:, :0], k[:, :0], cos[:, :0], sin[:, :0])
    wide = torch.randn(2, 5, 1, 258)
    assert not fits(wide, wide, *rope_cos_sin(torch.arange(5)[None], 258, 100.0, q.dtype))


def test_as_an_operator_of_the_library():
    """As `torch.compile` and subclasses of tensors see it."""
    q, k, _ = torch.randn(2, 5, 6, 8, requires_grad=True).split([4, 1, 1], 2)
    cos_sin = rope_cos_sin(torch.arange(5)[None], 8, 100.0, q.dtype)
    torch.library.opcheck(
        rotary._operation.op, ([q, k, *cos_sin], [True] * 4, ""), test_utils=("test_schema", "test_faketensor")
    )

    def loss(q, k):
        return sum(x.pow(3).sum() for x in rotated(q, k, *cos_sin))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(*(torch.autograd.grad(f(q, k), [q, k]) for f in (compiled, loss)), strict=True):
        assert_close(x, y, 1e-6)


@pytest.fixture
def everywhere(monkeypatch):
    """Softmax layers use the kernel also on the CPU."""
    return lambda on: monkeypatch.setattr(HLAAttention, "_has_kernels", lambda *_: on)


CONFIG = dict(
    vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    intermediate_size=32, layer_types=["full_attention"] * 2, initializer_range=0.3,
)  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "masked", "packed"])
def test_softmax_attention_in_training(how, everywhere, launches):
    model = HLAForCausalLM(HLAConfig(**CONFIG)).train()
    ids = torch.randint(0, 50, (1 if how == "packed" else 2, 21))
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    options = {
        "plain": {},
        "masked": dict(attention_mask=mask),
        "packed": dict(cu_seq_lens_q=torch.tensor([0, 2, 2, 9, 21], dtype=torch.int32)),
    }[how]

    def gradients(on: bool) -> list[torch.Tensor]:
        everywhere(on)
        loss = model(ids, labels=ids, **options).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    truth = gradients(False)
    assert launches == []
    for x, y in zip(gradients(True), truth, strict=True):
        assert_close(x, y, 1e-5)
    assert len(launches) == 4


@pytest.mark.parametrize("longest", [None, 16], ids=["growing cache", "static cache"])
@torch.no_grad()
def test_softmax_attention_with_a_cache(longest, everywhere, launches):
    """A prompt, and token after token."""
    model = HLAForCausalLM(HLAConfig(**CONFIG)).eval()
    ids = torch.randint(0, 50, (2, 9))

    def logits(on: bool) -> torch.Tensor:
        everywhere(on)
        cache = HLACache(model.config, longest)
        return torch.cat([model(x, past_key_values=cache).logits for x in ids.split([6, 1, 1, 1], 1)], 1)

    truth = logits(False)
    assert launches == []
    assert_close(logits(True), truth, 1e-5)
    assert len(launches) == 8


def test_the_compiler_gets_the_operations(everywhere, launches):
    attention = HLAAttention(HLAConfig(**CONFIG), 0)
    cos_sin = rope_cos_sin(torch.arange(5)[None], 12, 100.0, torch.float32)
    arguments = torch.randn(2, 5, 48), cos_sin, None, None, None
    everywhere(True)
    y = attention(*arguments)
    assert launches == ["_rotate"]
    assert_close(torch.compile(attention, fullgraph=True, backend="eager")(*arguments), y, 1e-5)
    assert launches == ["_rotate"]
