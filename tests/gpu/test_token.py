"""A token of a whole block in few launches, compiled: as near to float32 as the block operation by operation."""

import copy

import pytest
import torch

from hla import HigherOrderLinearAttention
from hla.models import HLACache, HLAConfig, HLAForCausalLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

MODELS = {
    "default": dict(hidden_size=256, num_attention_heads=2),
    "grouped, sizes that are no powers of two": dict(
        hidden_size=200, num_attention_heads=4, num_key_value_heads=2, head_dim=48, head_v_dim=80
    ),
    "wide values, no gates": dict(
        hidden_size=64,
        num_attention_heads=4,
        head_v_dim=128,
        write_gate=False,
        decay="none",
        ridge=0.5,
        nodes="chebyshev",
        conv_size=0,
        feature_map="elu1",
        qk_norm="rms",
    ),
    "wide keys": dict(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=128,
        head_v_dim=16,
        decay="fixed",
        ridge="head",
        conv_size=2,
        feature_map="relu",
        qk_norm="none",
        order=1,
    ),
    "neither norm nor gate of the heads": dict(
        hidden_size=128, num_attention_heads=2, output_norm=False, output_gate=False
    ),
    "linear_attn": dict(hidden_size=256, num_attention_heads=4, op="linear_attn", decay="fixed", conv_size=0),
}


def new_model(name: str, dtype: torch.dtype) -> HLAForCausalLM:
    torch.manual_seed(0)
    config = HLAConfig(**MODELS[name], num_hidden_layers=3, intermediate_size=320, vocab_size=500)
    model = HLAForCausalLM(config).eval().cuda()
    for parameter in model.parameters():  # weights at which a block does more than pass on its input
        if parameter.dim() == 2 and parameter.shape[1] > 16:
            parameter.data.mul_(3)
    return model.to(dtype)


@torch.inference_mode()
def logits_of(model: HLAForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    cache, out = HLACache(model.config), []
    for t in range(ids.shape[1]):
        seen = None if mask is None else mask[:, : t + 1]
        out.append(model(input_ids=ids[:, t : t + 1], attention_mask=seen, past_key_values=cache).logits[:, 0])
    return torch.stack(out, 1).double()


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_the_error_is_that_of_the_dtype(name, dtype, rows, monkeypatch):
    model = new_model(name, dtype)
    ids = torch.randint(500, (rows, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[::2, :3] = 0
    found = logits_of(model, ids, mask)
    from hla.kernels import token

    monkeypatch.setattr(token, "fits", lambda block, x: False)
    plain = logits_of(model, ids, mask)
    truth = logits_of(copy.deepcopy(model).float(), ids, mask)
    error, yardstick = ((x - truth).norm() / truth.norm() for x in (found, plain))
    assert not torch.equal(found, plain)  # it was used
    assert error <= 1.5 * yardstick and error < 5e-2, (error, yardstick)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_shaped_in_one_launch(name, dtype, monkeypatch):
    model = new_model(name, dtype)
    ids = torch.randint(500, (2, 300), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :70] = 0

    @torch.inference_mode()
    def logits(model) -> torch.Tensor:
        cache = HLACache(model.config)
        pieces = [
            model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 200), (200, 202), (202, 300))
        ]
        return torch.cat(pieces, 1)[mask != 0].double()

    found = logits(model)
    for name in ("_in_one_launch", "_shapes_in_kernels"):
        monkeypatch.setattr(HigherOrderLinearAttention, name, lambda *_: False)
    plain, truth = logits(model), logits(copy.deepcopy(model).double())
    error, yardstick = ((x - truth).norm() / truth.norm() for x in (found, plain))
    assert not torch.equal(found, plain)  # it was used
    # (float32: PyTorch's and Triton's exp and rsqrt round differently.)
    assert error < (min(1.5 * yardstick, 5e-2) if dtype == torch.bfloat16 else 1e-5), (error, yardstick)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs Hopper")
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 100])
@pytest.mark.parametrize("name", MODELS)
def test_overlapping_launches_compute_the_same(name, rows, monkeypatch):
    """In a graph, where launches follow each other without a gap: what is read too early is that of another token."""
    from benchmarks.cuda.probes import in_graph
    from hla.kernels import token

    model = new_model(name, torch.bfloat16)
    tokens = torch.randint(500, (40, rows, 1), device="cuda")

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        cache, ids, last = HLACache(model.config), tokens[0].clone(), []
        model(input_ids=ids, past_key_values=cache)
        replay = in_graph([lambda: last.append(model(input_ids=ids, past_key_values=cache).logits)], "cuda")
        out = []
        for x in tokens:
            ids.copy_(x)
            replay()
            out.append(last[-1].double())
        return torch.stack(out)

    found = logits()
    monkeypatch.setattr(token, "overlaps", lambda device: False)
    expected = logits()
    assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("rows", [33, 128])
@pytest.mark.parametrize("tile_rows", [16, 256])
def test_tiles_and_cublas_do_any_number_of_rows(tile_rows, rows, monkeypatch):
    from hla.kernels import token

    model = new_model("grouped, sizes that are no powers of two", torch.bfloat16)
    ids = torch.randint(500, (rows, 10), device="cuda")
    monkeypatch.setattr(token, "TILE_ROWS", tile_rows)
    found, again = logits_of(model, ids), logits_of(model, ids)
    monkeypatch.setattr(token, "fits", lambda block, x: False)
    plain, truth = logits_of(model, ids), logits_of(copy.deepcopy(model).float(), ids)
    error, yardstick = ((x - truth).norm() / truth.norm() for x in (found, plain))
    assert torch.equal(found, again)
    assert error <= 1.5 * yardstick and error < 5e-2, (error, yardstick)


# fills: of fresh memory with NaN, by tests/conftest.py. spare: cuBLAS may launch twice for each of six products.
@pytest.mark.parametrize("rows,launches,fills,spare", [(1, 5, 5, 0), (16, 8, 9, 0), (100, 8, 9, 0), (140, 11, 10, 6)])
def test_one_token_costs_few_launches_a_block(rows, launches, fills, spare):
    from benchmarks.cuda.probes import kernels_launched

    counts = []
    for layers in (1, 3):
        model = HLAForCausalLM(HLAConfig(**MODELS["default"], num_hidden_layers=layers, vocab_size=500))
        model = model.eval().cuda().to(torch.bfloat16)
        cache, ids = HLACache(model.config), torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
        with torch.inference_mode():
            counts.append(kernels_launched(lambda: model(input_ids=ids, past_key_values=cache), "cuda"))  # noqa: B023
    assert 0 <= counts[1] - counts[0] - 2 * (launches + fills) <= 2 * spare
