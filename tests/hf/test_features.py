"""What users of transformers expect of a causal language model, beside tests/test_models.py and tests/test_cache.py."""

import importlib
import json
import os
import subprocess
import sys
from threading import Thread

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hla.data import build_tokenizer
from hla.models import HLAConfig, HLAForCausalLM, add_remote_code
from tests.test_cache import make_model, random_ids

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
hybrid_too = pytest.mark.parametrize("options", [{}, HYBRID], ids=["linear", "hybrid"])


def byte_model(**options):
    """A tokenizer of bytes and a small model for it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("bytes", 0, [])
    config = HLAConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        eos_token_id=256, pad_token_id=256, **options,
    )  # fmt: skip
    return tokenizer, HLAForCausalLM(config).eval()


# -- generation -------------------------------------------------------------------------------------------------------


@hybrid_too
def test_pipeline_and_streamer_give_what_generate_gives(options, tmp_path):
    tokenizer, model = byte_model(**options)
    ids = tokenizer("Once upon", return_tensors="pt").input_ids
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :], True)

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", str(tmp_path))
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    assert generator("Once upon", **options)[0]["generated_text"] == wanted

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(
        target=model.generate, args=(ids,), kwargs={"streamer": streamer, "max_new_tokens": 12, "do_sample": False}
    )
    thread.start()
    assert "".join(streamer) == wanted
    thread.join()


def test_stop_strings():
    tokenizer, model = byte_model()
    ids = tokenizer("ab", return_tensors="pt").input_ids
    free = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    stop = free[3]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    stopped = tokenizer.decode(out[0, ids.shape[1] :])
    assert stopped == free[: free.index(stop) + 1] and len(stopped) < len(free)


def test_a_tokenizer_of_ours_turns_messages_into_text():
    tokenizer, _ = byte_model()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|endoftext|>Be brief.\nHello\n"
    assert tokenizer.apply_chat_template(messages)["input_ids"] == tokenizer("Be brief.\nHello\n").input_ids


@pytest.mark.parametrize("how", [{"assistant_model": make_model()}, {"prompt_lookup_num_tokens": 2}])
def test_assisted_decoding_is_refused(how):
    with pytest.raises(ValueError, match="not supported with stateful models"):
        make_model().generate(random_ids(1, 4), max_new_tokens=3, **how)


@hybrid_too
def test_generation_with_a_compiled_step(options):
    model, ids = make_model(**options), random_ids(2, 5)
    static = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **static)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(ids, **static), expected)


# -- training ---------------------------------------------------------------------------------------------------------


@hybrid_too
def test_collator_with_flattening(options):
    model = make_model(**options)
    documents = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 3, 8)]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    loss = model(**batch).loss
    alone = [model(torch.tensor([x]), labels=torch.tensor([x]), num_items_in_batch=13).loss for x in documents]
    torch.testing.assert_close(loss, sum(alone))


def test_shift_labels_are_taken_as_they_are():
    model, ids = make_model(), random_ids(2, 7)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    wrong = ids.roll(3, 1)
    torch.testing.assert_close(model(ids, labels=wrong, shift_labels=shifted).loss, model(ids, labels=ids).loss)


def test_gradients_of_hidden_states_can_be_kept():
    model, ids = make_model(), random_ids(2, 7)
    out = model(ids, output_hidden_states=True)
    for x in out.hidden_states:
        x.retain_grad()
    out.logits.sum().backward()
    assert all(x.grad is not None and bool((x.grad != 0).any()) for x in out.hidden_states)


def repeating_rows():
    """Rows of a period of four: learned once, never forgotten."""
    return [{"input_ids": ids, "labels": ids} for ids in ([(i + j % 4) for j in range(16)] for i in range(1, 9))]


def train(model, folder, steps, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True, use_cpu=True, logging_steps=1, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=repeating_rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@hybrid_too
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_trainer_learns_a_toy_set(options, tmp_path):
    model = make_model(torch.float32, **options)
    losses = train(model, tmp_path, 50)
    assert losses[0] > 3 and losses[-1] < 0.8, losses
    checkpointed = make_model(torch.float32, **options)
    again = train(checkpointed, tmp_path, 3, gradient_checkpointing=True)
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses[:3]), rtol=1e-3, atol=1e-3)


@hybrid_too
def test_lora(options, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = make_model(torch.float32, **options)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["qkv_proj", "o_proj"])
    model = peft.get_peft_model(base, config)
    losses = train(model, tmp_path / "run", 20)
    assert losses[-1] < losses[0] - 0.2, losses
    ids = random_ids(2, 9)
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        plain = make_model(torch.float32, **options)
        assert all(torch.equal(before[name], x) for name, x in plain.state_dict().items())
        assert (plain(ids).logits - wanted).abs().max() > 1e-3  # it did learn something
        model.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
        merged = loaded.merge_and_unload()
        assert type(merged) is HLAForCausalLM
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-5)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_low_precision_onto_a_device_map(dtype, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model = make_model(torch.float32, **HYBRID)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map={"": "cpu"})
    assert loaded.dtype == dtype and loaded.model.layers[0].mixer.A_log.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = random_ids(2, 9)
    assert (loaded(ids).logits - model(ids).logits).abs().max() < 0.02
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


REMOTE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, again = sys.argv[1:]
assert "hla" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
print(model.generate(tokenizer("ab", return_tensors="pt").input_ids, max_new_tokens=5, do_sample=False).tolist())
model.save_pretrained(again)
"""


def test_a_folder_with_remote_code_loads_where_hla_was_not_imported(tmp_path):
    tokenizer, model = byte_model(**HYBRID)
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_remote_code(folder)
    out = subprocess.run(
        [sys.executable, "-c", REMOTE, folder, again], check=True, capture_output=True, text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    ids = AutoTokenizer.from_pretrained(folder)("ab", return_tensors="pt").input_ids
    assert json.loads(out.stdout) == model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    # With hla imported the folder loads as any other, and a model saved again is as complete as the first.
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is HLAForCausalLM
    assert (again / "hla_model.py").read_text() == (folder / "hla_model.py").read_text()
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoConfig"] == "hla_model.HLAConfig"


def test_the_server_of_transformers_finds_the_model(tmp_path):
    for name in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(name, reason=f"serving needs {name}")
    tokenizer, model = byte_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    importlib.import_module("hla.transformers_cli")
    manager = importlib.import_module("transformers.cli.serving.model_manager").ModelManager(device="cpu")
    served, _ = manager.load_model_and_processor(f"{tmp_path}@main")
    assert type(served) is HLAForCausalLM
    manager.shutdown()


def test_remote_code_needs_a_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        add_remote_code(tmp_path)
