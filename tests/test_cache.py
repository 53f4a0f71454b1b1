"""The cache: constant size, fixed addresses, and beams and batches that stay with their own history."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from hla.layer_state import state_tensors
from hla.models import HLACache, HLACacheLayer, HLAConfig, HLAForCausalLM

VOCAB = 40


def make_model(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    config = HLAConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=6, intermediate_size=32,
        **options,
    )  # fmt: skip
    return HLAForCausalLM(config).to(dtype).eval()


def random_ids(batch, length, seed=1):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


OPTIONS = {
    "default": {},
    "token decay, rope": {"decay": "token", "use_rope": True, "num_key_value_heads": 2},
    "hla2": {"op": "hla2"},
    "hla3": {"op": "hla3", "decay": "fixed"},
    "no convolution, normalized": {
        "op": "hla2", "conv_size": 0, "normalize": True, "p": "q", "ridge": 0.0, "gain": 1.0, "feature_map": "elu1",
    },
    "hybrid": {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 2},
    "softmax first": {"layer_types": ["full_attention", "linear_attention"], "use_rope": True},
    "softmax": {"layer_types": ["full_attention", "full_attention"], "num_key_value_heads": 1},
}  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@every_option
@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_cached_pieces_give_what_one_pass_gives(options, static):
    model, ids = make_model(**options), random_ids(2, 24)
    whole = model(ids, use_cache=False)
    assert whole.past_key_values is None
    cache = HLACache(model.config, max_cache_len=30 if static else None)
    logits = []
    for part in ids.split([7, 1, 10, 1, 1, 1, 3], 1):
        out = model(part, past_key_values=cache)
        assert out.past_key_values is cache
        logits.append(out.logits)
    close(torch.cat(logits, 1), whole.logits)
    assert int(cache.get_seq_length()) == 24
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [24, 24]


@every_option
@torch.no_grad()
def test_left_padding_changes_nothing(options):
    model = make_model(**options)
    short, long = random_ids(1, 5, seed=2), random_ids(1, 12, seed=3)
    padded = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.int64), short], 1), long])
    mask = (padded != 0).long()
    both = model(padded, attention_mask=mask)
    alone = model(short)
    close(both.logits[:1, 7:], alone.logits)
    close(both.logits[1:], model(long).logits)
    for step in random_ids(2, 3, seed=4).split(1, 1):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        both = model(step, attention_mask=mask, past_key_values=both.past_key_values)
        alone = model(step[:1], past_key_values=alone.past_key_values)
        close(both.logits[:1], alone.logits)


@torch.no_grad()
def test_states_have_fixed_addresses_and_constant_size():
    model = make_model(torch.float32, decay="token", use_rope=True)
    cache = HLACache(model.config)
    assert cache.nbytes() == 0
    model(random_ids(2, 10), past_key_values=cache)
    tensors = [x for layer in cache.layers for x in (*state_tensors(layer.state), layer.seen_tokens)]
    size, addresses = cache.nbytes(), [x.data_ptr() for x in tensors]
    # 2 layers, 2 sequences: convolution 72 x 3, S and F 4 x 6 x 6 each, in float32, and one int64 position
    assert size == 2 * 2 * (4 * (72 * 3 + 2 * 4 * 6 * 6) + 8)
    assert all(x.dtype in (torch.float32, torch.int64) for x in tensors)
    for length in (1, 1, 200, 1):
        model(random_ids(2, length), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    model(random_ids(2, 4), past_key_values=cache)
    after = [x for layer in cache.layers for x in (*state_tensors(layer.state), layer.seen_tokens)]
    assert cache.nbytes() == size and [x.data_ptr() for x in after] == addresses


@torch.no_grad()
def test_state_bytes_are_the_same_after_10_and_10000_tokens():
    model = make_model(torch.float32)
    cache = HLACache(model.config)
    model(random_ids(1, 10), past_key_values=cache, logits_to_keep=1)
    after_10 = cache.nbytes()
    model(random_ids(1, 9990), past_key_values=cache, logits_to_keep=1)
    assert int(cache.get_seq_length()) == 10_000
    assert cache.nbytes() == after_10 > 0


@every_option
@torch.no_grad()
def test_reorder_repeat_and_select(options):
    model, ids, step = make_model(**options), random_ids(3, 9), random_ids(6, 1, seed=2)

    def continued(rows, new):
        return model(torch.cat([ids[rows], new], 1)).logits[:, -1:]

    cache = model(ids).past_key_values
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    close(model(step[:3], past_key_values=cache).logits, continued([2, 2, 0], step[:3]))

    cache = model(ids).past_key_values
    cache.batch_repeat_interleave(2)
    close(model(step, past_key_values=cache).logits, continued([0, 0, 1, 1, 2, 2], step))
    for layer in cache.layers:
        assert not isinstance(layer, HLACacheLayer) or layer.batch_size == 6

    for indices in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        cache = model(ids).past_key_values
        cache.batch_select_indices(indices)
        rows = [2, 0] if indices.dtype == torch.int64 else [0, 2]
        close(model(step[:2], past_key_values=cache).logits, continued(rows, step[:2]))


@every_option
@torch.no_grad()
def test_reset_starts_over(options):
    model, ids = make_model(**options), random_ids(2, 9)
    cache = HLACache(model.config)
    first = model(ids, past_key_values=cache).logits
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    close(model(ids, past_key_values=cache).logits, first)


def test_operations_on_a_fresh_cache_do_nothing():
    cache = HLACache(make_model().config)
    for layer in cache.layers:
        layer.reset()
        layer.reorder_cache(torch.tensor([0]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0 and cache.get_max_length() == -1
    assert cache.layers[0].get_mask_sizes(3) == (3, 0)


def test_layers_of_the_cache():
    config = make_model(layer_types=["linear_attention", "full_attention"]).config
    growing, static = HLACache(config), HLACache(config, max_cache_len=16)
    assert [type(layer) for layer in growing.layers] == [HLACacheLayer, DynamicLayer]
    assert [type(layer) for layer in static.layers] == [HLACacheLayer, StaticLayer]
    assert growing.is_linear == [True, False]
    assert static.is_compileable and not growing.is_compileable
    assert HLACache(make_model().config).is_compileable
    assert not growing.is_croppable and not growing.is_initialized


@torch.no_grad()
def test_cropping_is_refused():
    model = make_model()
    cache = model(random_ids(1, 4)).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-1)


@torch.no_grad()
def test_another_batch_size_or_kind_is_refused():
    model = make_model()
    cache = model(random_ids(2, 4)).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences"):
        model(random_ids(3, 1), past_key_values=cache)
    with pytest.raises(TypeError, match="past_key_values"):
        model(random_ids(2, 4), past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="past_key_values"):
        model.generate(random_ids(2, 4), past_key_values=DynamicCache(), max_new_tokens=2)


def test_states_hold_no_graph():
    model = make_model()
    out = model(random_ids(2, 4))  # with gradients enabled
    out = model(random_ids(2, 1), past_key_values=out.past_key_values)
    out.logits.sum().backward()
    assert not any(x.requires_grad for layer in out.past_key_values.layers for x in state_tensors(layer.state))


def test_a_cache_made_in_inference_mode_can_be_used_outside():
    model, ids = make_model(), random_ids(1, 6)
    with torch.inference_mode():
        cache = model(ids[:, :4]).past_key_values
    with torch.no_grad():
        close(model(ids[:, 4:], past_key_values=cache).logits, model(ids).logits[:, 4:])


@torch.no_grad()
def test_bfloat16_models_keep_float32_states():
    model = make_model(torch.bfloat16)
    cache = model(random_ids(1, 6)).past_key_values
    model(random_ids(1, 1), past_key_values=cache)
    assert all(x.dtype == torch.float32 for layer in cache.layers for x in state_tensors(layer.state))


@every_option
@torch.no_grad()
def test_compiled_decoding_is_one_graph(options):
    model, ids = make_model(**options), random_ids(2, 12)
    whole = model(ids).logits
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = HLACache(model.config, max_cache_len=16)
    model(ids[:, :7], past_key_values=cache)
    for t in range(7, 12):
        close(compiled(ids[:, t : t + 1], past_key_values=cache).logits, whole[:, t : t + 1])
    assert len(graphs) == 1
