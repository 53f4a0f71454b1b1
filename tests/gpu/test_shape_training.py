"""The kernels around the operator of a layer that trains, on a card, beside the operations they replace."""

import copy

import pytest
import torch
from torch.nn import functional as F

from hla import HigherOrderLinearAttention
from hla.models import HLAConfig
from hla.models.modeling_hla import HLAAttention
from hla.norm import RMSNorm
from hla.rotary import rope_cos_sin
from tests.kernels.test_shape import CASES

pytest.importorskip("triton")
from hla.kernels import rotary
from hla.kernels.shape_training import gated_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_no_worse(found: list, plain: list, truth: list, dtype: torch.dtype) -> None:
    floor = 2e-5 if dtype == torch.float32 else 2e-3
    for i, (x, y, z) in enumerate(zip(found, plain, truth, strict=True)):
        error, yardstick = (float((a.double() - z).norm() / z.norm().clamp(min=1e-30)) for a in (x, y))
        assert error <= max(1.2 * yardstick, floor), (i, error, yardstick)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["plain", "masked", "packed"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "grouped"])
def test_convolution_feature_map_norm_and_write_gate(case, how, dtype, monkeypatch):
    torch.manual_seed(0)
    layer = HigherOrderLinearAttention(512, 4, **CASES[case]).cuda().to(dtype)
    B, T = (1, 900) if how == "packed" else (2, 450)
    x = torch.randn(B, T, 512, device="cuda").to(dtype)
    mask = torch.ones(B, T, 1, device="cuda", dtype=torch.bool)
    mask[0, 300:] = False
    ends = torch.tensor([0, 2, 2, 500, 900], dtype=torch.int32, device="cuda")
    given = mask if how == "masked" else None, None, ends if how == "packed" else None

    def results(layer: HigherOrderLinearAttention, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        outputs = layer._project(x, *given, None, False)[:3]
        generator = torch.Generator("cuda").manual_seed(1)
        douts = [torch.randn(y.shape, device="cuda", generator=generator).to(dtype).to(y.dtype) for y in outputs]
        used = [layer.qkv_proj.weight]
        used += [layer.conv_weight] if layer.conv_size else []
        used += [layer.write_proj.weight] if layer.write_gate else []
        return [*outputs, *torch.autograd.grad(outputs, [x, *used], douts)]

    truth = results(copy.deepcopy(layer).double(), x.double())
    found, again = results(layer, x), results(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    monkeypatch.setattr(HigherOrderLinearAttention, "_has_kernels", lambda *_: False)
    assert_no_worse(found, results(layer, x), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("D", [40, 128])
def test_gated_norm(D, gated, dtype):
    torch.manual_seed(0)
    norm = RMSNorm(D, eps=1e-6).cuda()
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    o, gate, dout = torch.randn(2, 700, 3, D), torch.randn(2, 700, 3 * D), torch.randn(2, 700, 3 * D)
    o, gate, dout = (y.cuda().to(dtype) for y in (o, gate, dout))

    def results(function, norm: RMSNorm, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [y.to(wide).requires_grad_() for y in ((o, gate) if gated else (o,))]
        out = function(norm, leaves[0], leaves[1] if gated else None)
        return [out, *torch.autograd.grad(out, [*leaves, norm.weight], dout.to(wide))]

    def plain(norm: RMSNorm, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return norm(o).flatten(2) * (1 if gate is None else F.silu(gate))

    truth = results(plain, copy.deepcopy(norm).double(), torch.float64)
    assert_no_worse(results(gated_norm, norm, dtype), results(plain, norm, dtype), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["plain", "masked", "packed"])
@pytest.mark.parametrize("D", [64, 96])
def test_softmax_attention_with_rotary_embeddings(D, how, dtype, monkeypatch):
    torch.manual_seed(0)
    config = HLAConfig(hidden_size=512, num_attention_heads=6, num_key_value_heads=2, head_dim=D)
    attention = HLAAttention(config, 0).cuda().to(dtype)
    B, T = (1, 900) if how == "packed" else (2, 450)
    x, dy = (torch.randn(B, T, 512, device="cuda").to(dtype) for _ in range(2))
    mask = torch.ones(B, T, device="cuda", dtype=torch.bool)
    mask[0, 300:] = False
    positions = mask.long().cumsum(1) - 1 if how == "masked" else torch.arange(T, device="cuda")[None]
    ends = torch.tensor([0, 2, 2, 500, 900], dtype=torch.int32, device="cuda")
    given = mask if how == "masked" else None, ends if how == "packed" else None, None
    launches = []
    monkeypatch.setattr(rotary, "launch", lambda *a, f=rotary.launch, **k: (launches.append(a[0]), f(*a, **k)))

    def results(attention: HLAAttention, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = attention(x, rope_cos_sin(positions, D, 10_000.0, x.dtype), *given)
        return [y, *torch.autograd.grad(y, [x, *attention.parameters()], dy.to(y.dtype))]

    truth = results(copy.deepcopy(attention).double(), x.double())
    assert launches == []
    found = results(attention, x)
    assert len(launches) == 2
    monkeypatch.setattr(HLAAttention, "_has_kernels", lambda *_: False)
    assert_no_worse(found, results(attention, x), truth, dtype)
