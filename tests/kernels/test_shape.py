"""What a layer does between projections and operator, in one launch, equals the layer operation by operation."""

import pytest
import torch

from hla import HigherOrderLinearAttention
from hla.layers import LayerState
from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels.shape import project, supports

CASES = {
    "default": {},
    "grouped": dict(num_kv_heads=2, head_dim=16, head_v_dim=24, bias=True),
    "no conv": dict(conv_size=0, feature_map="elu1", qk_norm="rms"),
    "no gates": dict(write_gate=False, decay="none", ridge=0.5, nodes="chebyshev", conv_size=1),
    "fixed decay": dict(decay="fixed", ridge="head", feature_map="relu", qk_norm="none", conv_size=2),
    "linear_attn": dict(op="linear_attn", feature_map="identity"),
}


def new_layer(options: dict) -> HigherOrderLinearAttention:
    torch.manual_seed(0)
    layer = HigherOrderLinearAttention(40, 4, **options)
    for name, parameter in layer.named_parameters():
        if "node_logits" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return layer


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 2, 70])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_launch_equals_the_operations(case, T, masked, history):
    layer = new_layer(CASES[case])
    assert supports(layer)
    x = torch.randn(2, T, 40)
    mask = (torch.rand(2, T, 1) > 0.3) if masked else None
    before = torch.randn(2, layer.channels, layer.conv_size - 1) if history and layer.conv_size else None
    q, k, v, _, conv = layer._project(x, mask, None, None, before, True)
    expected = {"g": layer._log_decay(x, mask), **layer._coefficients(x, k)}
    found_q, found_k, found_v, found_conv, found = project(layer, x, mask, before, True)
    pairs = [(found_q, q), (found_k, k), (found_v, v), (found_conv, conv)]
    assert found.pop("order", None) == (layer.order if layer.op == "hla_q" else None)
    assert found.keys() == expected.keys()
    for a, b in [*pairs, *((found[n], expected[n]) for n in found)]:
        if isinstance(b, torch.Tensor) and b.numel():
            assert_close(a, b.double(), 1e-6)
        else:
            assert isinstance(b, torch.Tensor) or a == b


@pytest.mark.parametrize(
    "options", [dict(op="hla2"), dict(rope_theta=10.0), dict(nodes="token"), dict(backend="torch")]
)
def test_other_layers_go_operation_by_operation(options):
    assert not supports(new_layer(options))


@pytest.mark.parametrize("method", ["_project", "_coefficients", "_log_decay"])
def test_a_subclass_with_coefficients_of_its_own_is_left_to_them(method):
    changed = type("Changed", (HigherOrderLinearAttention,), {method: lambda *_: None})
    assert not supports(changed(40, 4)) and supports(type("Unchanged", (HigherOrderLinearAttention,), {})(40, 4))


@torch.no_grad()
def test_a_layer_gives_the_same_in_pieces():
    """The history that one launch leaves is what the next one takes, also of pieces shorter than the convolution."""
    layer = new_layer({})
    layer._in_one_launch = lambda *_: True  # on a CPU too: by the interpreter
    x = torch.randn(1, 9, 40)
    whole, _ = layer(x)
    state: LayerState | None = None
    pieces = []
    for piece in x.split([2, 1, 6], 1):
        y, state = layer(piece, state=state, output_state=True)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), whole.double(), 2e-6)
