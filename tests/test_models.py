"""The language model: loss, packing, generation, and Hugging Face's saving and loading."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

import hla
from hla.models import SIZES, HLACache, HLAConfig, HLAForCausalLM, HLAModel, count_parameters
from tests.test_cache import OPTIONS, VOCAB, close, every_option, make_model, random_ids

HYBRID = OPTIONS["hybrid"]

# PyTorch remembers its constructors at the first use of a device context: let it be those from before any is patched,
# so that loading on the meta device is what is tested.
with torch.device("meta"):
    assert torch.empty(1).is_meta


# -- forward and loss -------------------------------------------------------------------------------------------------


@every_option
def test_loss_is_the_mean_over_next_tokens_and_every_parameter_learns(options):
    model, ids = make_model(**options), random_ids(2, 11)
    out = model(ids, labels=ids, use_cache=False)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    summed = model(ids, labels=ids, num_items_in_batch=40).loss
    torch.testing.assert_close(summed, expected * 20 / 40)


@every_option
@torch.no_grad()
def test_causal(options):
    model, ids = make_model(torch.float32, **options), random_ids(2, 70)
    logits = model(ids).logits
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % VOCAB
    other = model(changed).logits
    assert torch.equal(logits[:, :40], other[:, :40]) and not torch.equal(logits[:, 40], other[:, 40])


@every_option
@pytest.mark.parametrize("how", ["cu_seq_lens_q", "position_ids", "position_ids of two rows"])
def test_packed_documents_give_what_separate_ones_give(options, how):
    model = make_model(**options)
    lengths = [5, 1, 9, 3] if how != "position_ids of two rows" else [6, 3, 9]
    documents = [random_ids(1, length, seed=length) for length in lengths]
    packed = torch.cat(documents, 1)
    if how == "cu_seq_lens_q":
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        borders = torch.cat([borders[:2], borders[1:]])  # with an empty document
        arguments = {"input_ids": packed, "cu_seq_lens_q": borders}
    else:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        arguments = {"input_ids": packed, "position_ids": positions}
        if how == "position_ids of two rows":
            arguments = {name: x.reshape(2, 9) for name, x in arguments.items()}
    out = model(**arguments, labels=arguments["input_ids"])
    assert out.past_key_values is None
    separate = [model(document, use_cache=False).logits for document in documents]
    close(out.logits.reshape(1, -1, VOCAB), torch.cat(separate, 1))
    # Nothing is predicted across a border.
    losses = [
        F.cross_entropy(logits[0, :-1].float(), document[0, 1:], reduction="sum")
        for logits, document in zip(separate, documents, strict=True)
        if document.shape[1] > 1
    ]
    torch.testing.assert_close(out.loss, sum(losses) / (sum(lengths) - len(lengths)))


@every_option
def test_right_padding_while_training(options):
    model = make_model(**options).train()
    short, long = random_ids(1, 6), random_ids(1, 10, seed=2)
    padded = torch.cat([F.pad(short, (0, 4), value=VOCAB - 1), long])
    mask = torch.ones_like(padded)
    mask[0, 6:] = 0
    out = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    assert out.past_key_values is None  # nobody pays for a cache while training
    close(out.logits[:1, :6], model(short).logits)
    out.loss.backward()
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    for ids in (short, long):
        model(ids, labels=ids, num_items_in_batch=14).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, grad, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_changes_nothing():
    model, ids = make_model(**HYBRID, use_rope=True).train(), random_ids(2, 11)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        out = model(ids, labels=ids, use_cache=True)
        assert out.past_key_values is None
        out.loss.backward()
        for name, parameter in model.named_parameters():
            close(parameter.grad, expected[name])


@torch.no_grad()
def test_outputs():
    model, ids = make_model(**HYBRID), random_ids(2, 7)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and isinstance(out.past_key_values, HLACache)
    close(out.hidden_states[0], model.model.embed_tokens(ids))
    close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    close(model.model(ids).last_hidden_state, out.hidden_states[-1])
    close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, out.logits[:, [1, 4]])
    logits, cache = model(ids, return_dict=False)
    close(logits, out.logits)
    assert isinstance(cache, HLACache)
    assert len(model(ids, return_dict=False, use_cache=False)) == 1
    close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, out.logits)


def test_bad_inputs_are_named():
    model, ids = make_model(), random_ids(1, 6)
    with pytest.raises(ValueError, match="input_ids"):
        model()
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 6, 24))
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 2, 6]), past_key_values=HLACache(model.config))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(TypeError, match="cu_seqlens"):
        model(ids, cu_seqlens=torch.tensor([0, 2, 6]))


def test_bfloat16_model():
    model, ids = make_model(torch.float32, **HYBRID, decay="token"), random_ids(2, 33)
    exact = model(ids, labels=ids)
    low = model.bfloat16()(ids, labels=ids)
    assert low.logits.dtype == torch.bfloat16
    assert abs(low.loss - exact.loss) < 0.01
    low.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# -- generation -------------------------------------------------------------------------------------------------------

GENERATE = {"max_new_tokens": 9, "pad_token_id": 0}


def generate(model, ids, **options):
    """Greedy unless told otherwise; the result with the logits of every step in ``logits [steps, B, vocab]``."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **GENERATE, **options}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    out.logits = torch.stack(out.logits)
    return out


@every_option
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_does_not_depend_on_the_cache(options, beams):
    model, ids = make_model(**options), random_ids(2, 6)
    cached = generate(model, ids, num_beams=beams)
    assert cached.sequences.shape == (2, 15)
    for how in ({"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
        other = generate(model, ids, num_beams=beams, **how)
        assert torch.equal(other.sequences, cached.sequences)
        torch.testing.assert_close(other.logits, cached.logits, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(layer, DynamicLayer) for layer in other.past_key_values.layers)
    if beams == 1:
        greedy = ids
        for _ in range(9):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(greedy, cached.sequences)


@every_option
def test_generation_from_a_left_padded_batch(options):
    model = make_model(**options)
    prompts = [random_ids(1, length, seed=length) for length in (2, 7, 5)]
    alone = [generate(model, prompt) for prompt in prompts]
    padded = torch.cat([F.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    together = generate(model, padded, attention_mask=(padded != 0).long())
    assert torch.equal(together.sequences[:, -9:], torch.cat([out.sequences[:, -9:] for out in alone]))
    torch.testing.assert_close(together.logits, torch.cat([out.logits for out in alone], 1), rtol=1e-5, atol=1e-6)


@every_option
def test_generation_continues_from_a_cache(options):
    model, ids = make_model(**options), random_ids(2, 6)
    whole = generate(model, ids, max_new_tokens=12)
    first = generate(model, ids)
    assert torch.equal(first.sequences, whole.sequences[:, :15])
    second = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(second.sequences, whole.sequences)
    torch.testing.assert_close(second.logits, whole.logits[9:], rtol=1e-5, atol=1e-6)
    assert int(first.past_key_values.get_seq_length()) == 17


def test_sampling_and_embeddings_as_prompt():
    model, ids = make_model(), random_ids(2, 6)
    mask = torch.ones_like(ids)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        runs.append(model.generate(ids, attention_mask=mask, do_sample=True, top_k=5, use_cache=use_cache, **GENERATE))
    assert torch.equal(runs[0], runs[1])
    several = model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=4, **GENERATE)
    assert several.shape == (8, 15) and len({tuple(row.tolist()) for row in several}) > 4
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, do_sample=False, **GENERATE
    )
    assert torch.equal(embedded, model.generate(ids, attention_mask=mask, do_sample=False, **GENERATE)[:, 6:])


def test_generation_refuses_what_it_cannot_do():
    model, ids = make_model(), random_ids(1, 4)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation="quantized", **GENERATE)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=make_model(), **GENERATE)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(ids, cu_seqlens=torch.tensor([0, 4]), **GENERATE)


# -- saving, loading, initialisation ----------------------------------------------------------------------------------


@every_option
@torch.no_grad()
def test_saved_and_loaded_through_the_auto_classes(options, tmp_path):
    model, ids = make_model(torch.float32, **options), random_ids(2, 9)
    for parameter in model.parameters():  # not what a fresh model has
        parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hla"

    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is HLAConfig
    assert all(getattr(config, name) == getattr(model.config, name) for name in HLAConfig.__annotations__)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HLAForCausalLM and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is HLAModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
def test_what_a_checkpoint_lacks_starts_as_in_a_fresh_model(tmp_path):
    model = make_model(torch.float32, op="hla2", decay="token", ridge="head", gain="head")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = ("A_log", "dt_bias", "conv_weight", "gain_head", "o_norm.weight", "o_proj.weight")
    kept = {name: x for name, x in weights.items() if not name.endswith(gone)}
    assert len(weights) - len(kept) == 12
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mixer = HLAForCausalLM.from_pretrained(tmp_path).model.layers[1].mixer
    assert torch.equal(mixer.qkv_proj.weight, model.model.layers[1].mixer.qkv_proj.weight)
    torch.testing.assert_close(mixer.gain_head, torch.full((4,), 0.0498), rtol=1e-3, atol=0)
    assert torch.equal(mixer.o_norm.weight, torch.ones(6))
    assert 0.015 < mixer.conv_weight.std() < 0.025
    assert 0.005 < mixer.o_proj.weight.std() < 0.015
    assert bool(((mixer.A_log >= 0) & (mixer.A_log <= 2.8)).all() and (mixer.dt_bias < -2).all())


@pytest.mark.parametrize("names", [("A_log", "dt_bias", "ridge_head", "node_logits"), ("log_b",)])
def test_low_precision_loading_keeps_time_scales(tmp_path, names):
    model = make_model(torch.float32, op="hla2" if "log_b" in names else "hla_q")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer, original = loaded.model.layers[0].mixer, model.model.layers[0].mixer
    assert loaded.lm_head.weight.dtype == mixer.qkv_proj.weight.dtype == torch.bfloat16
    for name in names:
        assert torch.equal(getattr(mixer, name), getattr(original, name))
    loaded(random_ids(1, 5), labels=random_ids(1, 5)).loss.backward()


def test_initialisation():
    torch.manual_seed(0)
    config = HLAConfig(vocab_size=500, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, op="hla3",
                       decay="token", layer_types=["linear_attention", "full_attention"] * 4)  # fmt: skip
    model = HLAForCausalLM(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel() > 1000:
            expected = 0.02 / 4 if name.endswith(("o_proj", "down_proj")) else 0.02
            assert abs(module.weight.std() - expected) < 0.1 * expected, name
    mixer = model.model.layers[0].mixer
    assert bool((mixer.log_b == -3).all()) and 0.018 < mixer.conv_weight.std() < 0.022
    loss = model(random_ids(4, 50), labels=random_ids(4, 50)).loss
    assert abs(loss - torch.tensor(500.0).log()) < 0.1


def test_resized_embeddings_stay_tied():
    model = make_model(torch.float32)
    model.resize_token_embeddings(VOCAB + 9)
    assert model.config.vocab_size == VOCAB + 9
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = random_ids(1, 5) + 9
    assert model(ids, labels=ids).logits.shape == (1, 5, VOCAB + 9)


def test_untied_embeddings():
    model, ids = make_model(torch.float32, tie_word_embeddings=False), random_ids(1, 5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model(ids, labels=ids).loss.backward()
    assert (model.lm_head.weight.grad != 0).any()


def test_importing_hla_does_not_import_transformers():
    code = "import sys, hla; hla.HigherOrderLinearAttention; assert 'transformers' not in sys.modules; hla.HLAConfig"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert hla.HLAForCausalLM is HLAForCausalLM and hla.HLAModel is HLAModel


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "vocab", "millions"),
    [("tiny", 2048, 1.36), ("small", 8192, 25), ("base", 32000, 124), ("medium", 32000, 348), ("large", 32000, 1325)],
)
def test_sizes(size, vocab, millions):
    assert list(SIZES) == ["tiny", "small", "base", "medium", "large"]
    config = HLAConfig(**SIZES[size], vocab_size=vocab)
    assert abs(count_parameters(config) / 1e6 - millions) < 0.01 * millions


def test_parameters_are_counted_right():
    model = make_model()
    assert count_parameters(model.config) == sum(x.numel() for x in model.parameters())


def test_defaults():
    config = HLAConfig()
    assert config.layer_types == ["linear_attention"] * 12
    assert (config.head_dim, config.head_v_dim, config.num_key_value_heads) == (64, 64, 12)
    assert config.intermediate_size == 2048 and config.tie_word_embeddings
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    mixer = hla.HigherOrderLinearAttention(768, 12)
    own = HLAForCausalLM(HLAConfig(num_hidden_layers=1, vocab_size=8)).model.layers[0].mixer
    assert repr(own) == repr(mixer)


BAD = [
    ({"vocab_size": 0}, ValueError, "vocab_size"),
    ({"hidden_size": "24"}, TypeError, "hidden_size"),
    ({"hidden_size": 25}, ValueError, "hidden_size"),
    ({"num_hidden_layers": 0}, ValueError, "num_hidden_layers"),
    ({"num_attention_heads": 2.0}, TypeError, "num_attention_heads"),
    ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads"),
    ({"num_key_value_heads": 0}, ValueError, "num_key_value_heads"),
    ({"head_dim": 300}, ValueError, "head_dim"),
    ({"intermediate_size": -1}, ValueError, "intermediate_size"),
    ({"hidden_act": "swosh"}, ValueError, "hidden_act"),
    ({"initializer_range": 0}, ValueError, "initializer_range"),
    ({"initializer_range": None}, TypeError, "initializer_range"),
    ({"rms_norm_eps": 0.0}, ValueError, "norm_eps"),
    ({"max_position_embeddings": 0}, ValueError, "max_position_embeddings"),
    ({"use_cache": 1}, TypeError, "use_cache"),
    ({"tie_word_embeddings": None}, TypeError, "tie_word_embeddings"),
    ({"use_rope": "yes"}, TypeError, "use_rope"),
    ({"eos_token_id": 40}, ValueError, "eos_token_id"),
    ({"pad_token_id": -1}, ValueError, "pad_token_id"),
    ({"bos_token_id": "<s>"}, TypeError, "bos_token_id"),
    ({"layer_types": ["linear_attention"]}, ValueError, "layer_types"),
    ({"layer_types": ["linear_attention", "softmax"]}, ValueError, "layer_types"),
    ({"layer_types": "linear_attention"}, ValueError, "layer_types"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, ValueError, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}, "use_rope": True}, ValueError, "rope_theta"),
    ({"rope_parameters": 3}, ValueError, "rope_parameters must be"),
    ({"layer_types": 3}, ValueError, "layer_types must be"),
    ({"head_dim": 5}, ValueError, "head_dim must be even"),
    ({"head_dim": 5, "layer_types": ["full_attention"] * 2}, ValueError, "head_dim"),
    ({"op": "gla"}, ValueError, "op must"),
    ({"op": "hla2", "p": "q"}, ValueError, 'p = "k"'),
    ({"ridge": "channel"}, ValueError, "ridge"),
    ({"op": "hla2", "gain": 1.0}, ValueError, "ridge and gain"),
    ({"decay": "scalar"}, ValueError, "decay"),
    ({"conv_size": None}, TypeError, "conv_size"),
    ({"feature_map": "gelu"}, ValueError, "feature_map"),
    ({"qk_norm": True}, TypeError, "qk_norm"),
    ({"normalize": "no"}, TypeError, "normalize"),
    ({"hidden_sise": 24}, TypeError, "hidden_size"),
    ({"dropout": 0.1}, TypeError, "dropout"),
]


@pytest.mark.parametrize(("bad", "error", "named"), BAD, ids=[str(bad) for bad, _, _ in BAD])
def test_bad_configurations_are_named(bad, error, named):
    good = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    HLAConfig(**good)
    with pytest.raises(error, match=named):
        HLAConfig(**{**good, **bad})


def test_saved_configurations_keep_their_meaning_when_defaults_change(tmp_path):
    sizes = {"model_type": "hla", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2}
    first = HLAConfig.from_dict({**sizes, "num_attention_heads": 4})  # of version 1, which saved no defaults
    assert (first.op, first.p, first.ridge, first.gain, first.decay, first.write_gate) == (
        "hla2", "k", "delta", "delta", "none", False,
    )  # fmt: skip
    assert HLAConfig.from_dict({**sizes, "num_attention_heads": 4, "decay": "fixed"}).decay == "fixed"
    now = HLAConfig(**{n: x for n, x in sizes.items() if n != "model_type"}, num_attention_heads=4)
    assert (now.op, now.ridge, now.write_gate, now.config_version) == ("hla_q", "token", True, 2)
    for config in (first, now):
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert {"op", "order", "nodes", "decay", "ridge", "write_gate", "config_version"} <= set(saved)
        assert HLAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    saved["config_version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="config_version 3.*newer"):
        HLAConfig.from_pretrained(tmp_path)
