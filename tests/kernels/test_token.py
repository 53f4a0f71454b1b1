"""A token of a block in a few launches equals the block operation by operation: outputs and states, token by token."""

import pytest
import torch

from hla.layer_state import state_tensors
from hla.models import HLAConfig
from hla.models.modeling_hla import HLABlock
from tests.kernels import gluon
from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels import shape_step
from hla.kernels import token as kernels
from hla.kernels.token import fits, token

COMMON = dict(hidden_size=40, num_attention_heads=4, intermediate_size=72, num_hidden_layers=1, vocab_size=16)
CASES = {
    "default": {},
    "grouped": dict(num_key_value_heads=2, head_dim=16, head_v_dim=24),
    "no conv": dict(conv_size=0, feature_map="elu1", qk_norm="rms"),
    "no gates": dict(write_gate=False, decay="none", output_gate=False, ridge=0.5, nodes="chebyshev"),
    "fixed decay": dict(
        decay="fixed", ridge="head", output_norm=False, feature_map="relu", qk_norm="none", conv_size=2
    ),
    "neither norm nor gate of the heads": dict(output_norm=False, output_gate=False, head_dim=16),
    "long rows": dict(hidden_size=16, head_dim=16, intermediate_size=264),
    "linear_attn": dict(op="linear_attn", feature_map="identity"),
}
# (case, rows, rows up to which there are tiles, multiprocessors)
MANY = [
    ("default", 17, 64, 132),
    ("grouped", 17, 16, 132),
    ("no gates", 17, 16, 132),
    ("no gates", 33, 64, 2),
    ("default", 64, 64, 2),
    ("default", 65, 64, 132),
    ("linear_attn", 70, 128, 1),
]


def new_block(options: dict, dtype=torch.float32, device="cpu") -> HLABlock:
    torch.manual_seed(0)
    block = HLABlock(HLAConfig(**COMMON | options), 0).to(device)
    for name, parameter in block.named_parameters():
        if "node_logits" not in name:
            torch.nn.init.normal_(parameter, std=0.5) if parameter.dim() < 2 else parameter.data.mul_(2)
    for part in block.modules():
        if isinstance(part, torch.nn.Linear):
            part.to(dtype)
    return block.eval()


@pytest.mark.parametrize("rows,masked", [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("case", CASES)
def test_a_token_equals_the_block(case, masked, rows):
    check(new_block(CASES[case]), rows, masked)


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_that_are_too_long_to_be_asked_for_as_a_whole(rows, monkeypatch):
    monkeypatch.setattr(kernels, "WHOLE", 0)
    check(new_block(CASES["long rows"]), rows, masked=False, tokens=2)


@pytest.mark.parametrize("case,rows,tiles,multiprocessors", MANY)
def test_many_rows(case, rows, tiles, multiprocessors, monkeypatch):
    monkeypatch.setattr(kernels, "TILE_ROWS", tiles)
    monkeypatch.setattr(kernels, "device_config", lambda device: ((9, 0), multiprocessors))
    heads = dict(num_attention_heads=2, num_key_value_heads=1)  # few, for the interpreter's sake
    check(new_block(CASES[case] | heads), rows, masked=True, tokens=1)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
def test_tiles_occupy_the_multiprocessors_and_fit_into_shared_memory(capability, side):
    def tile(sizes, D, pair=False, summed=False):
        found = kernels._tile(side, sizes, D, pair, summed, capability, 132)
        memory = 2 * found.stages * kernels.COLUMNS * (side + found.rows)
        assert memory <= (99 if capability == (8, 6) else 163) * 1024
        return found.rows, found.parts

    assert tile((8192, 16, 16, 16), 2048) == (64, 1)
    assert tile((2304, 768, 12, 12, 12), 768) == (32, 1)  # 51 programs would be too few
    assert tile((5120,), 2048, pair=True) == (64, 1)
    assert tile((2048,), 5120, summed=True) == (64, 4)
    assert tile((768,), 768, summed=True) == (64, 3)  # of six steps, two for each part
    assert tile((1536,), 1536, summed=True) == (64, 4)  # of twelve steps, three: a fifth part would have none


@pytest.mark.parametrize("rows,D", [(3, 600), (33, 640), (130, 600)])
def test_products_in_parts(rows, D, monkeypatch):
    """Five steps over the columns, of which one part has three; and tiles that are not whole."""
    monkeypatch.setattr(kernels, "device_config", lambda device: ((9, 0), 8))
    x, residual = torch.randn(rows, D), torch.randn(rows, 70)
    norm = torch.nn.RMSNorm(70, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    weights = [torch.randn(n, D) / 25 for n in (70, 3)]
    with torch.no_grad():
        partial = kernels._product(x, weights[:1], summed=True)
        assert partial.shape == (2, rows, 70)
        total, normed = kernels._added(partial, residual, norm=norm)
        expected = residual + x @ weights[0].T
        assert_close(total, expected.double(), 2e-6, "sum")
        assert_close(normed, norm(expected).double(), 2e-6, "norm")
        assert kernels._added(partial, residual)[0].equal(total)
        assert_close(kernels._product(x, weights), (x @ torch.cat(weights).T).double(), 2e-6, "products")
        both = [torch.randn(70, D) / 25 for _ in range(2)]
        expected = torch.nn.functional.silu(x @ both[0].T) * (x @ both[1].T)
        assert_close(kernels._product(x, both, swiglu=True), expected.double(), 2e-6, "gated")


def test_an_input_cut_from_a_longer_one():
    block, x = new_block({}), torch.randn(3, 5, 40)
    states = [block.mixer.zero_state(3, torch.float32, "cpu") for _ in range(2)]
    with torch.no_grad():
        y, expected = (
            token(block, z, state, None) for z, state in zip((x[:, 4:], x[:, 4:].clone()), states, strict=True)
        )
    assert torch.equal(y, expected)


@torch.no_grad()
def check(block: HLABlock, rows: int, masked: bool, tokens: int = 4) -> None:
    states = [block.mixer.zero_state(rows, torch.float32, "cpu") for _ in range(2)]
    for t in range(tokens):
        x = torch.randn(rows, 1, block.input_layernorm.weight.shape[0])
        mask = torch.rand(rows, 1) > 0.5 if masked and t < 2 else None
        o, _ = block.mixer(block.input_layernorm(x), attention_mask=mask, state=states[0], out_state=states[0])
        h = x + o
        expected = h + block.mlp(block.post_attention_layernorm(h))
        y = token(block, x, states[1], mask)
        assert_close(y, expected.double(), 2e-6, "y")
        for a, b in zip(*map(state_tensors, states), strict=True):
            assert_close(b, a.double(), 2e-6, "state")


@pytest.mark.parametrize("rows,tiles", [(1, 128), (3, 128), (3, 2)])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("linear_attn", "long rows")])
def test_a_token_through_the_step_in_gluon(case, rows, tiles, monkeypatch):
    monkeypatch.setattr(kernels, "TILE_ROWS", tiles)
    launched = gluon.on_the_cpu(monkeypatch, shape_step)
    check(new_block(CASES[case]), rows, masked=True)
    assert len(launched) == 4


@pytest.mark.parametrize("case", ["default", "no conv"])
def test_the_step_in_gluon_in_bfloat16(case, monkeypatch):
    """Beside the step in Triton, whose interpreter cuts off where this rounds."""
    block = new_block(CASES[case], torch.bfloat16)
    mixer = block.mixer
    states = [mixer.zero_state(2, torch.bfloat16, "cpu") for _ in range(2)]
    launched = gluon.on_the_cpu(monkeypatch, shape_step)
    for _ in range(3):
        parts = {n: torch.randn(2, p.out_features).bfloat16() for n, p in kernels._projections(mixer).items()}
        with torch.no_grad():
            found = shape_step.shape_step(mixer, parts, states[0], None, False)
            plain = kernels._shape_and_step(mixer, parts, states[1], None, False).flatten(1)
            expected = kernels._normed_gated(
                plain, norm=mixer.o_norm, gate=parts.get("gate_proj"), width=mixer.head_v_dim
            )
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() < 1.5e-2 * expected.double().norm()
        for a, b in zip(*map(state_tensors, states), strict=True):
            assert (a.double() - b).norm() < 1.5e-2 * b.double().norm()
    assert len(launched) == 3


def test_many_programs_have_P_in_shared_memory(monkeypatch):
    gluon.on_the_cpu(monkeypatch, shape_step)
    many = []
    launch = shape_step.launch
    monkeypatch.setattr(shape_step, "launch", lambda *a, **kw: (many.append(kw["MANY"]), launch(*a, **kw)))
    monkeypatch.setattr(shape_step, "FEW_PROGRAMS", 6)
    check(new_block(dict(num_attention_heads=2, head_dim=128)), 3, masked=True)
    assert many == [True] * 4


def test_a_state_of_another_layer_does_not_fit(monkeypatch):
    """The kernel would read and write beyond it; `hla.step`, to which it then goes, names what is wrong."""
    monkeypatch.setattr(shape_step, "has_gluon", lambda capability: True)
    mixer, x = new_block({}).mixer, torch.zeros(2, 40)
    state = mixer.zero_state(2, torch.float32, "cpu")
    assert shape_step.fits(mixer, state, x)
    S, P = state.op
    cut = [(S[:1], P), (S[:, :3], P), (S[..., :8], P), (S, P[..., :8]), (S, P[:, :2])]
    others = [(s.contiguous(), p.contiguous()) for s, p in cut]
    for s, p in [*others, (S.half(), P), (S, P.double()), (S, P.mT), (S[:, None].repeat(1, 2, 1, 1, 1)[:, 0].mT, P)]:
        assert not shape_step.fits(mixer, state._replace(op=state.op._replace(S=s, P=p)), x)
    for conv in (None, state.conv[:1], state.conv[:, 1:], state.conv[..., 1:]):
        assert not shape_step.fits(mixer, state._replace(conv=conv), x)


def test_a_state_that_shared_memory_cannot_take_goes_to_the_step(monkeypatch):
    """With many programs P is copied there as it is, 16 bytes at a time."""
    monkeypatch.setattr(shape_step, "has_gluon", lambda capability: True)
    mixer = new_block(dict(num_attention_heads=1, head_dim=128)).mixer
    grouped = new_block(dict(num_attention_heads=2, num_key_value_heads=1, head_dim=128)).mixer
    for rows, fit in ((131, True), (132, False)):
        x = torch.zeros(rows, 40)
        state, longer = mixer.zero_state(rows, torch.float32, "cpu"), torch.zeros(rows * (128 * 128 + 8) + 1)
        assert shape_step.fits(mixer, state, x)
        assert shape_step.fits(grouped, grouped.zero_state(rows, torch.float32, "cpu"), x) == fit
        apart, moved = longer[:-1].view(rows, -1)[:, None, :-8], longer[1 : rows * 128 * 128 + 1]
        for P in (apart, moved):
            other = state._replace(op=state.op._replace(P=P.view(rows, 1, 128, 128)))
            assert shape_step.fits(mixer, other, x) == fit
        half = state._replace(op=state.op._replace(S=state.op.S.bfloat16(), P=state.op.P.bfloat16()))
        assert shape_step.fits(mixer, half, x) == fit


def test_what_it_does_not_do_goes_operation_by_operation():
    x = torch.zeros(2, 1, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        assert fits(new_block({}, torch.bfloat16), x)
        assert not fits(new_block({}, torch.bfloat16), x[:1].expand(2, 2, 40))
        assert fits(new_block({}, torch.bfloat16), x[:1].expand(300, 1, 40))
        assert not fits(new_block({}), x.float())
        for options in (dict(op="hla2"), dict(use_rope=True), dict(hidden_act="gelu"), dict(nodes="token")):
            assert not fits(new_block(options, torch.bfloat16), x)
        block = new_block({}, torch.bfloat16)
        block.mixer.qkv_proj = torch.nn.Sequential(block.mixer.qkv_proj)  # as adapters wrap it
        assert not fits(block, x)
        block = new_block({}, torch.bfloat16)
        weight = block.mlp.up_proj.weight
        weight.data = torch.zeros(weight.numel() + 1, dtype=weight.dtype)[1:].view(weight.shape)  # not at 16 bytes
        assert not fits(block, x)
        block = new_block({}, torch.bfloat16)
        block.mixer.register_forward_hook(lambda *_: None)
        assert not fits(block, x)
    assert not fits(new_block({}, torch.bfloat16), x)  # a gradient is wanted
