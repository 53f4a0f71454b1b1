"""Few rows through a matrix in parts: the product of the module, and only where the module has nothing else to say."""

import pytest
import torch
from torch import nn

from hla import projection
from hla.models import HLACache, HLAConfig, HLAForCausalLM
from hla.projection import project


@pytest.fixture
def in_parts(monkeypatch):
    """The sizes of the matrices that were multiplied in parts."""
    sizes = []

    def spy(linear, x, original=projection._in_parts):
        if yes := original(linear, x):
            sizes.append(tuple(linear.weight.shape))
        return yes

    monkeypatch.setattr(projection, "SMALL", 0)
    monkeypatch.setattr(projection, "_in_parts", spy)
    return sizes


@pytest.mark.parametrize("shape", [(1, 1, 12), (3, 1, 12), (1, 4, 12), (2, 2, 12), (12,), (5, 1, 12), (0, 1, 12)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_it_is_the_product(shape, bias, in_parts):
    linear = nn.Linear(12, 40, bias=bias).double()
    x = torch.randn(*shape).double()
    y = project(linear, x)
    torch.testing.assert_close(y, linear(x), rtol=1e-13, atol=1e-13)
    assert y.is_contiguous()
    assert len(in_parts) == (0 < x.numel() <= 4 * 12)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def linear_with(change) -> nn.Linear:
    linear = nn.Linear(12, 40, bias=False)
    change(linear)
    return linear


@pytest.mark.parametrize(
    "linear",
    [
        Doubled(12, 40),
        nn.Linear(12, 42),
        nn.Linear(12, 40, dtype=torch.bfloat16),
        linear_with(lambda m: m.register_forward_hook(lambda *call: 2 * call[-1])),
        linear_with(lambda m: m.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],))),
        linear_with(lambda m: setattr(m, "forward", lambda x: torch.zeros(1))),
        linear_with(lambda m: setattr(m, "weight", nn.Parameter(torch.randn(12, 40).mT))),
    ],
    ids=["subclass", "odd rows", "bfloat16", "hook", "pre-hook", "forward", "transposed"],
)
@torch.no_grad()
def test_what_is_not_a_plain_matrix_is_called(linear, in_parts):
    x = torch.randn(1, 1, 12, dtype=linear.weight.dtype)
    assert torch.equal(project(linear, x), linear(x))
    assert not in_parts


def test_gradients_and_autocast_go_through_the_module(in_parts):
    linear, x = nn.Linear(12, 40), torch.randn(1, 1, 12)
    assert project(linear, x).requires_grad
    with torch.no_grad(), torch.autocast("cpu"):
        assert project(linear, x).dtype == torch.bfloat16
    assert not in_parts


@torch.no_grad()
def test_decoding_multiplies_every_matrix_in_parts(in_parts):
    """And gives what reading all tokens at once gives, which multiplies none so."""
    config = HLAConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = HLAForCausalLM(config).double().eval()
    ids = torch.randint(64, (1, 9))
    cache = HLACache(config)
    whole = model(input_ids=ids).logits[:, -1]
    model(input_ids=ids[:, :-1], past_key_values=cache)
    in_parts.clear()
    y = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(y, whole, rtol=1e-9, atol=1e-9)
    mlp = [(48, 32), (48, 32), (32, 48)]
    assert in_parts == [(96, 32), (32, 32), (32, 32), *mlp, (96, 32), (32, 32), *mlp, (64, 32)]
