"""States as files: they go on exactly where they were, and no other model and no damaged file gets through."""

import copy
import gc
import json
import pickle
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hla.errors import HLAError
from hla.generate import read, stream
from hla.layer_state import state_tensors
from hla.models import HLACache, HLACacheLayer, HLAConfig, HLAForCausalLM
from hla.models.state_file import digest, fingerprint, read_state
from tests.test_cache import OPTIONS, VOCAB, close, every_option, make_model, random_ids
from tests.text_helpers import MICRO


def tiny(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    sizes = {**MICRO, "num_hidden_layers": 2, "vocab_size": VOCAB, "initializer_range": 0.5, **options}
    return HLAForCausalLM(HLAConfig(**sizes)).to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def state_file(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("states") / "a.state"
    read(model, random_ids(1, 20))[0].save(path)
    return path


def tensors_of(cache: HLACache) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        if isinstance(layer, HLACacheLayer):
            found += [*state_tensors(layer.state), layer.seen_tokens]
        else:
            found += [layer.keys, layer.values]
    return found


def same(one: HLACache, other: HLACache) -> None:
    for x, y in zip(tensors_of(one), tensors_of(other), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# -- saving and loading ---------------------------------------------------------------------------------------------


OPTIONS_TOO = {**OPTIONS, "ahla": {"op": "ahla", "normalize": True}, "linear_attn": {"op": "linear_attn"}}


@pytest.mark.parametrize("options", OPTIONS_TOO.values(), ids=OPTIONS_TOO.keys())
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_loaded_state_goes_on_to_the_bit(options, static, tmp_path):
    model, ids = make_model(**options), random_ids(2, 24)
    cache = HLACache(model.config, max_cache_len=30 if static else None)
    for part in ids[:, :17].split([7, 1, 9], 1):
        model(part, past_key_values=cache)
    cache.save(tmp_path / "a.state")
    loaded = HLACache.load(tmp_path / "a.state")
    same(loaded, cache)
    assert int(loaded.get_seq_length()) == 17 and loaded.nbytes() == cache.nbytes()
    assert [type(x) for x in loaded.layers] == [type(x) for x in cache.layers]
    assert loaded.is_compileable == cache.is_compileable and loaded.next_logits is None
    for part in ids[:, 17:].split([1, 5, 1], 1):
        assert torch.equal(model(part, past_key_values=loaded).logits, model(part, past_key_values=cache).logits)
    same(loaded, cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_dtypes_are_kept(dtype, tmp_path):
    model, ids = tiny(dtype=dtype, layer_types=["linear_attention", "full_attention"]), random_ids(1, 9)
    cache = model(ids[:, :6]).past_key_values
    cache.save(tmp_path / "a")
    loaded = HLACache.load(tmp_path / "a", model)
    same(loaded, cache)
    assert loaded.layers[1].keys.dtype == dtype
    out = [model(ids[:, 6:], past_key_values=c).logits for c in (loaded, cache)]
    assert torch.equal(*out)


@every_option
@torch.no_grad()
def test_left_padded_batches_go_on(options, tmp_path):
    model = make_model(**options)
    ids = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.int64), random_ids(1, 5, 2)], 1), random_ids(1, 12, 3)])
    mask = torch.cat([(ids != 0).long(), torch.ones(2, 1, dtype=torch.int64)], 1)
    model(ids, attention_mask=mask[:, :-1], past_key_values=(cache := HLACache(model.config)))
    cache.save(tmp_path / "a")
    step = random_ids(2, 1, seed=4)
    logits = model(step, attention_mask=mask, past_key_values=HLACache.load(tmp_path / "a")).logits
    close(logits[:1], model(torch.cat([ids[:1, 7:], step[:1]], 1)).logits[:, -1:])
    close(logits[1:], model(torch.cat([ids[1:], step[1:]], 1)).logits[:, -1:])


def test_a_file_has_the_same_size_after_1000_and_4000_tokens(model, tmp_path):
    cache = read(model, random_ids(1, 1000))[0]
    cache.save(tmp_path / "short")
    read(model, random_ids(1, 3000), cache=cache)[0].save(tmp_path / "long")
    sizes = [(tmp_path / name).stat().st_size for name in ("short", "long")]
    assert sizes[0] == sizes[1] > cache.nbytes()
    assert int(HLACache.load(tmp_path / "long").get_seq_length()) == 4000


def test_a_file_is_safetensors_and_anyone_can_read_it(state_file, model):
    with safe_open(state_file, "pt") as file:
        assert {"layers.0.op.S", "layers.1.conv", "layers.0.seen_tokens", "next_logits"} <= set(file.keys())
        about = json.loads(file.metadata()["hla_state"])
    assert about["format_version"] == 1
    assert about["made_with"]["config"]["config_version"] == model.config.config_version


def test_a_loaded_state_that_met_no_model_can_be_saved_again(state_file, model, tmp_path):
    HLACache.load(state_file).save(tmp_path / "again")
    same(HLACache.load(tmp_path / "again", model), HLACache.load(state_file))
    with pytest.raises(HLAError, match="another model"):
        HLACache.load(tmp_path / "again", tiny(seed=1))
    with pytest.raises(HLAError, match="another model"):
        HLACache.load(state_file).save(tmp_path / "again", tiny(seed=1))


def test_the_device_can_be_chosen(state_file, model):
    loaded = HLACache.load(state_file, device="meta")
    assert {x.device.type for x in [*tensors_of(loaded), loaded.next_logits]} == {"meta"}
    loaded = HLACache.load(state_file)
    for layer in loaded.layers:
        layer.to(torch.device("meta"))
    with torch.device("meta"):
        elsewhere = HLAForCausalLM(model.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hla.models.cache_hla.check_model", lambda *arguments: None)
        loaded = HLACache.load(state_file)
        loaded.check(elsewhere)
    assert {x.device.type for x in tensors_of(loaded)} == {"meta"}


def test_a_state_loaded_in_inference_mode_can_be_used_outside(state_file, model):
    with torch.inference_mode():
        loaded = HLACache.load(state_file, model)
        copied = read(model, random_ids(1, 5))[0].copy()
    for cache in (loaded, copied):
        assert not any(x.is_inference() for x in tensors_of(cache))
        model(random_ids(1, 2), past_key_values=cache).logits.sum().backward()


@torch.no_grad()
def test_compiled_decoding_goes_on_in_one_graph(state_file, model):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    one, other = HLACache.load(state_file, model), HLACache.load(state_file, model)
    for step in random_ids(1, 3).split(1, 1):
        logits = compiled(step, past_key_values=one).logits
        # (Outside of a graph a CPU takes a shorter way for one token, which rounds differently.)
        torch.testing.assert_close(logits, model(step, past_key_values=other).logits, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_hugging_face_generate_goes_on(model, tmp_path):
    ids = random_ids(1, 12)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 12:]
    read(model, ids[:, :9])[0].save(tmp_path / "a")
    given = torch.cat([torch.zeros_like(ids[:, :9]), ids[:, 9:]], 1)  # nobody reads the first ones again
    mask = torch.ones_like(given)
    loaded = HLACache.load(tmp_path / "a", model)
    out = model.generate(
        given, attention_mask=mask, past_key_values=loaded, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert out[0, 12:].tolist() == expected.tolist()


# -- the wrong model ------------------------------------------------------------------------------------------------


def test_every_single_weight_tensor_counts(model):
    before = fingerprint(model)
    changed = copy.deepcopy(model)
    assert fingerprint(changed) == before
    parameters = dict(changed.model.named_parameters())
    assert len(parameters) == len(before.weights)
    for i, x in enumerate(parameters.values()):
        at = i % x.numel()
        old = x.data.view(-1)[at].clone()
        x.data.view(-1)[at] = torch.nextafter(old, torch.tensor(9.0))
        after = fingerprint(changed).weights
        assert [a != b for a, b in zip(after, before.weights, strict=True)] == [j == i for j in range(len(after))]
        x.data.view(-1)[at] = old


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (3,), (7, 5), (90, 101)])
def test_a_digest_sees_every_element_and_its_place(dtype, shape):
    x = (torch.randn(shape) * 60).to(dtype)
    seen = {digest(x), digest(x.to(torch.float64)), digest(x[None])}
    assert len(seen) == 3
    strided, shifted = torch.stack([x, x], -1)[..., 0], torch.cat([x.flatten()[:1], x.flatten()])[1:].view(shape)
    assert digest(x) == digest(strided) == digest(shifted)
    places = torch.randperm(x.numel())[:50].tolist()
    for at in places:
        y = x.clone()
        y.view(-1).view(torch.uint8)[at * x.element_size()] ^= 1
        assert digest(y) not in seen
    swapped = x.flatten()[torch.randperm(x.numel())].view(shape)
    assert torch.equal(swapped, x) or digest(swapped) not in seen


def test_a_digest_sees_what_only_changed_places():
    x = torch.randn(3 * 2048)  # three rows of 1024 words of two numbers
    within_a_row, within_a_column = x.clone(), x.clone()
    within_a_row[:4] = x[[2, 3, 0, 1]]
    within_a_column[[0, 1, 2048, 2049]] = x[[2048, 2049, 0, 1]]
    assert len({digest(x), digest(within_a_row), digest(within_a_column)}) == 3


def another(kind):
    if kind == "weights":
        return tiny(seed=1)
    if kind == "dtype":
        return tiny(dtype=torch.bfloat16)
    if kind == "one layer":
        model = tiny()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
        return model
    return tiny(**kind)


WRONG_MODELS = [
    ("weights", "weight tensors differ, the first is embed_tokens.weight"),
    ("one layer", "1 of 36 weight tensors differ, the first is layers.1.mlp.up_proj.weight"),
    ("dtype", "the weights were float32 and are bfloat16"),
    ({"op": "hla2"}, "op was 'hla_q' and is 'hla2'"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps was 1e-06 and is 1e-05"),
    ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types was"),
    ({"num_hidden_layers": 3}, "num_hidden_layers was 2 and is 3"),
]


@pytest.mark.parametrize("kind, reason", WRONG_MODELS)
def test_the_state_of_another_model_is_refused(kind, reason, state_file):
    wrong = another(kind)
    uses = {
        "load": lambda: HLACache.load(state_file, wrong),
        "first use": lambda: wrong(random_ids(1, 1), past_key_values=HLACache.load(state_file)),
        "inner model": lambda: wrong.model(random_ids(1, 1), past_key_values=HLACache.load(state_file)),
        "next_logits": lambda: next(stream(wrong, [], max_tokens=1, cache=HLACache.load(state_file))),
    }
    for use in uses.values():
        with pytest.raises(HLAError) as error:
            use()
        told = str(error.value)
        assert reason in told and "\n" not in told
        assert "made with an unnamed model (2 layers of width 32, " in told and ", met an unnamed model (" in told
    cache = HLACache.load(state_file)
    for _ in range(2):  # a refused cache stays refused
        with pytest.raises(HLAError, match="another model"):
            wrong(random_ids(1, 1), past_key_values=cache)


def test_an_output_head_of_its_own_counts(tmp_path):
    model = tiny(tie_word_embeddings=False)
    read(model, random_ids(1, 5))[0].save(tmp_path / "a")
    HLACache.load(tmp_path / "a", model)
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(HLAError, match="its output head differs"):
        HLACache.load(tmp_path / "a", model)


def test_what_does_not_change_the_meaning_of_a_state_is_free(state_file, model, tmp_path):
    model.save_pretrained(tmp_path / "named")
    again = HLAForCausalLM.from_pretrained(tmp_path / "named")
    HLACache.load(state_file, again)
    free = {"max_position_embeddings": 77, "eos_token_id": 3, "use_cache": False}
    HLACache.load(state_file, tiny(**free))
    again.model.norm.weight.data[0] = 2
    with pytest.raises(HLAError, match="met 'named' .*, the first is norm.weight"):  # the name, not the whole path
        HLACache.load(state_file, again)


def test_wrapped_models_are_the_same_model(state_file, model):
    compiled = torch.compile(model, backend="eager")
    assert fingerprint(compiled).weights == fingerprint(model).weights
    cache = HLACache.load(state_file, torch.nn.ModuleDict({"wrapped": model}))
    assert int(cache.get_seq_length()) == 20
    HLACache.load(state_file, compiled)
    with pytest.raises(HLAError, match="Linear is none"):
        HLACache.load(state_file, torch.nn.Linear(2, 2))


def test_a_cache_without_its_model_says_so(tmp_path):
    model = tiny()
    cache = HLACache(model.config)
    with pytest.raises(HLAError, match="the cache is empty"):
        cache.save(tmp_path / "a")
    read(model, [1, 2], cache=cache)
    moved = pickle.loads(pickle.dumps(cache))
    del model
    gc.collect()
    for orphan in (cache, moved):
        with pytest.raises(HLAError, match="model=model"):
            orphan.save(tmp_path / "a")
        orphan.save(tmp_path / "a", tiny())
    HLACache.load(tmp_path / "a", tiny())


# -- damaged files --------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(HLAError) as error:
        HLACache.load(path)
    assert "\n" not in str(error.value) and repr(str(path)) in str(error.value)
    return str(error.value)


def test_any_flipped_byte_is_found(tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "conv_size": 0}
    path = tmp_path / "a"
    model = tiny(**small)
    read(model, [1])[0].save(path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(1, 256, (len(data),), generator=generator).tolist()
    for at, bit in enumerate(bits):
        if at > 64 and at % 3:  # a third of them, to save time
            continue
        damaged = bytearray(data)
        damaged[at] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(HLAError):
            read_state(path)
    path.write_bytes(data)
    read_state(path)


def test_truncated_files_are_found(state_file, tmp_path):
    data = state_file.read_bytes()
    for size in [0, 3, 8, 100, len(data) // 2, len(data) - 1]:
        (tmp_path / "a").write_bytes(data[:size])
        assert "is damaged" in refused(tmp_path / "a")
    (tmp_path / "a").write_bytes(data + b"\0")
    assert "is damaged" in refused(tmp_path / "a")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a"
    assert "cannot read" in refused(path)
    assert "cannot read" in refused(tmp_path)
    for content in (b"Once upon a time, in a land far away", bytes(1000), struct.pack("<Q", 2) + b"[]", b"\xff" * 99):
        path.write_bytes(content)
        assert "no state file at all" in refused(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.zeros(3)}, path, metadata)
        assert "a safetensors file without a state" in refused(path)


def rewritten(path: Path, out: Path, change) -> None:
    """The file with its description changed, and a right checksum."""
    from hla.models import state_file as module

    tensors, made_with, _, layout = read_state(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMAT_VERSION", change.pop("format_version", module.FORMAT_VERSION))
        made_with.config.update(change)
        module.write_state(out, tensors, made_with, layout)


def test_other_versions_are_refused(state_file, model, tmp_path):
    rewritten(state_file, tmp_path / "a", {"format_version": 2})
    assert "has format version 2; this release of hla reads version 1" in refused(tmp_path / "a")
    rewritten(state_file, tmp_path / "a", {"config_version": 99})
    assert "config_version 99" in refused(tmp_path / "a")
    rewritten(state_file, tmp_path / "a", {"invention": 1})
    assert "no argument 'invention'" in refused(tmp_path / "a")
    rewritten(state_file, tmp_path / "a", {})
    HLACache.load(tmp_path / "a", model)


def test_a_full_disk_leaves_the_earlier_file(state_file, tmp_path):
    """A limit on the size of files stands in for it."""
    path = tmp_path / "a"
    path.write_bytes(before := state_file.read_bytes())
    cache = HLACache.load(state_file)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, old[1]))
        with pytest.raises(HLAError, match="cannot save the state to .*File too large"):
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(state_file, tmp_path, monkeypatch):
    import os

    events, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", Path(a).parent)), replace(a, b)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    HLACache.load(state_file).save(tmp_path / "a")
    assert events == ["fsync", ("replace", tmp_path), "fsync"]
    (tmp_path / "link").symlink_to("a")
    HLACache.load(state_file).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    for place, reason in ((tmp_path, "is a folder"), (tmp_path / "no" / "a", "does not exist")):
        with pytest.raises(HLAError, match=reason):
            HLACache.load(state_file).save(place)
