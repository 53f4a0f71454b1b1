"""A model on a mesh of data, sequence and tensor parallelism learns what one process learns from the same batches."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import hla
from hla.distributed import clip_grad_norm, full_state_dict, parallelize_hla, shard_sequence
from tests.distributed.ranks import ROOT, run_snippet
from tests.ops.cases import assert_close

PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
MESHES = [(4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1), (1, 1, 4)]
STEPS, ROWS, LENGTH, VOCAB = 5, 4, 32, 37
TOLERANCE = {"losses": 1e-6, "norms": 1e-5, "weights": 3e-5}
MAX_NORM = 0.5  # below the norm of every step, so that clipping counts
# Every kind of parameter that there is: per head and per token, grouped heads, an own inner query, both head sizes.
OPTIONS = {
    "default": {},
    "hla3": {"op": "hla3", "p": "proj", "ridge": "head", "gain": "token", "value_ridge": 0.5, "value_gain": "head"},
    "delta": {"op": "hla2", "tie_word_embeddings": False},
    "nodes": {"nodes": "token", "num_attention_heads": 8, "num_key_value_heads": 4, "head_v_dim": 6, "use_rope": True},
    "softmax": {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 2},
}


def make_model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return hla.HLAForCausalLM(hla.HLAConfig(vocab_size=VOCAB, **{**sizes, **options})).train()


def batch_at(step: int) -> dict[str, torch.Tensor]:
    """Rows with patterns to learn; every second step some rows have far fewer labels than others."""
    generator = torch.Generator().manual_seed(step)
    ids = (torch.randint(VOCAB, (ROWS, 1), generator=generator) + 3 * torch.arange(LENGTH)) % VOCAB
    labels = ids.clone()
    if step % 2:
        labels[0, 4:] = -100
        labels[3, 9:] = -100
    return {"input_ids": ids, "labels": labels}


def train(model, mesh=None, steps=STEPS) -> tuple[list[float], list[float]]:
    """Of all steps the losses, means over all labels whoever has them, and the norms of the gradients."""
    has_dp = mesh is not None and "dp" in mesh.mesh_dim_names
    dp, replica = (mesh["dp"].size(), mesh["dp"].get_local_rank()) if has_dp else (1, 0)
    # (With a tiny eps a gradient that is nothing but rounding would move its parameter as far as any other.)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    losses, norms = [], []
    for step in range(steps):
        batch = batch_at(step)
        items = int((batch["labels"][:, 1:] != -100).sum()) / dp if step % 2 else None
        rows = ROWS // dp
        batch = {name: x[replica * rows : (replica + 1) * rows] for name, x in batch.items()}
        if model.sequence_parallel is not None:
            batch = shard_sequence(batch, model.sequence_parallel)
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        loss = loss.detach() / dp
        if has_dp:
            dist.all_reduce(loss, group=mesh["dp"].get_group())
        clip = torch.nn.utils.clip_grad_norm_ if mesh is None else clip_grad_norm
        norm = clip(model.parameters() if mesh is None else model, MAX_NORM)
        assert norm > MAX_NORM
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


def compare(model, mesh, truth, single, rank, case):
    """Trains a parallel model and holds it against what one process found."""
    found = train(model, mesh, len(truth[0]))
    # Neither Adam nor clipping feels a factor in the gradient; the norms do.
    for what, x, y in zip(("losses", "norms"), found, truth, strict=True):
        assert_close(torch.tensor(x), torch.tensor(y), TOLERANCE[what], f"{case}: {what}")
    evaluate(model, single, mesh, case)
    state, weights = full_state_dict(model), single.state_dict()
    if rank:
        assert state == {}
        return
    assert set(state) == set(weights)
    for name, x in state.items():
        assert x.device.type == "cpu" and not isinstance(x, DTensor)
        assert_close(x, weights[name], TOLERANCE["weights"], f"{case}: {name}")


@torch.no_grad()
def evaluate(model, single, mesh, case):
    """Copies of a parameter are copies, to the bit; and the loss of a batch that all ranks have whole."""
    for name, parameter in model.named_parameters() if "tp" in mesh.mesh_dim_names else ():
        if name not in model.placement.cuts:
            mine = parameter.to_local().contiguous()
            copies = [torch.empty_like(mine) for _ in range(mesh["tp"].size())]
            dist.all_gather(copies, mine, group=mesh["tp"].get_group())
            assert all(torch.equal(mine, x) for x in copies), f"{case}: {name}"
    batch = batch_at(0)
    piece = batch if model.sequence_parallel is None else shard_sequence(batch, model.sequence_parallel)
    assert_close(model.eval()(**piece).loss, single.eval()(**batch).loss, TOLERANCE["losses"], f"{case}: evaluation")


def check_meshes(groups, rank, name, shapes, steps):
    start = make_model(**OPTIONS[name])
    single = copy.deepcopy(start)
    truth = train(single, steps=steps)
    assert truth[0][0] - truth[0][-1] > 0.1
    for shape in shapes:
        names = tuple(shape) if isinstance(shape, dict) else ("dp", "sp", "tp")
        sizes = tuple(shape.values()) if isinstance(shape, dict) else shape
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        model = parallelize_hla(copy.deepcopy(start), mesh)
        assert (model.sequence_parallel is not None) == ("sp" in names and mesh["sp"].size() > 1)
        tp = mesh["tp"].size() if "tp" in names else 1
        for block, whole in zip(model.model.layers, start.model.layers, strict=True):
            assert block.mixer.num_heads == whole.mixer.num_heads // tp
            assert block.mlp.down_proj.in_features == whole.mlp.down_proj.in_features // tp
        compare(model, mesh, truth, single, rank, (name, shape))


def test_every_mesh_learns_what_one_process_learns(run):
    run(check_meshes, "default", MESHES, STEPS)


@pytest.mark.parametrize("name,shapes", [
    ("hla3", [(1, 2, 2), (1, 1, 4)]),
    ("delta", [(2, 1, 2), (1, 2, 2)]),
    ("nodes", [(1, 2, 2), (1, 1, 4)]),
    ("softmax", [(2, 1, 2)]),
])  # fmt: skip
def test_other_layers(run, name, shapes):
    run(check_meshes, name, shapes, 3)


def test_dimensions_that_are_not_needed_can_be_left_out(run):
    run(check_meshes, "default", [{"tp": 4}, {"sp": 4}, {"dp": 2, "tp": 2}], 3)


def check_checkpointing(groups, rank, shape, compile, **options):
    start = make_model(**options)
    single = copy.deepcopy(start)
    truth = train(single, steps=2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "sp", "tp"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = parallelize_hla(start, mesh, activation_checkpointing=True, compile=compile)
    calls = []
    if not compile:  # (a hook would be compiled with the rest)
        model.model.layers[0].register_forward_hook(lambda *_: calls.append("block"))
        model.model.layers[0].mixer.o_norm.register_forward_hook(lambda *_: calls.append("inside"))
    found = train(model, mesh, 2)
    for what, x, y in zip(("losses", "norms"), found, truth, strict=True):
        assert_close(torch.tensor(x), torch.tensor(y), TOLERANCE[what], what)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if compile:
        assert graphs > 0 and not torch._dynamo.utils.counters["graph_break"]
    else:
        assert graphs == 0 and calls == ["inside", "block", "inside"] * 2  # the last one in the backward pass


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 2, 2)])
def test_activation_checkpointing(run, shape):
    run(partial(check_checkpointing, shape=shape, compile=False))


def test_compilation(run):
    """(Of an operator that dynamo reads in seconds, and without a backend behind it, which takes even longer.)"""
    run(partial(check_checkpointing, shape=(2, 1, 2), compile="eager", op="linear_attn", num_hidden_layers=1))


def check_mixed_precision(groups, rank):
    start = make_model()
    truth = train(copy.deepcopy(start), steps=3)
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "sp", "tp"))
    model = parallelize_hla(start, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    used, block = {}, model.model.layers[1]
    block.mixer.qkv_proj.register_forward_hook(
        lambda *_: used.update({n: p.dtype for n, p in block.named_parameters()})
    )
    model.lm_head.register_forward_hook(lambda m, *_: used.update({"lm_head": m.weight.dtype}))
    found = train(model, mesh, 3)
    for x, y in zip(found, truth, strict=True):
        assert_close(torch.tensor(x), torch.tensor(y), 0.02)
    assert found != truth
    for name, dtype in used.items():
        matrix = name == "lm_head" or name.endswith("proj.weight")
        assert dtype == (torch.bfloat16 if matrix else torch.float32), name
    assert len(used) == 1 + len(list(block.parameters()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = fully_shard.state(module)._fsdp_param_group
            assert group is None or group.mp_policy.reduce_dtype == torch.float32


def test_mixed_precision(run):
    run(check_mixed_precision)


def check_after_an_evaluation(groups, rank):
    """A forward pass without a backward pass leaves FSDP's root unsharded."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "sp", "tp"))
    model = parallelize_hla(make_model(), mesh)
    batch = batch_at(0)
    model(**batch).loss.backward()
    norm = clip_grad_norm(model, 1e9)
    with torch.no_grad():
        model(**batch)
    assert_close(clip_grad_norm(model, 1e9), norm, TOLERANCE["norms"])


def test_clipping_after_an_evaluation(run):
    run(check_after_an_evaluation)


def check_no_cache_in_training(groups, rank):
    """A block that runs a second time must not advance a cache a second time."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "sp", "tp"))
    model = parallelize_hla(make_model(), mesh, activation_checkpointing=True)
    ids = batch_at(0)["input_ids"]
    assert model(ids, use_cache=True).past_key_values is None
    assert model.eval()(ids, use_cache=True).past_key_values is not None


def test_no_cache_in_training(run):
    run(check_no_cache_in_training)


def check_refusals(groups, rank):
    mesh = init_device_mesh("cpu", (1, 1, 4), mesh_dim_names=("dp", "sp", "tp"))
    model = make_model()
    two_heads = make_model(num_key_value_heads=2)
    with pytest.raises(ValueError, match="num_kv_heads must be divisible .* over 4 ranks, but layer 0 has 2"):
        parallelize_hla(two_heads, mesh)
    with pytest.raises(ValueError, match="intermediate_size must be divisible .* has 50"):
        parallelize_hla(make_model(intermediate_size=50), mesh)
    with pytest.raises(ValueError, match='decay must be "none" or "token" .* "fixed"'):
        parallelize_hla(make_model(decay="fixed"), mesh)
    with pytest.raises(ValueError, match=r"layers \[1\] are full_attention"):
        sequence = init_device_mesh("cpu", (4,), mesh_dim_names=("sp",))
        parallelize_hla(make_model(layer_types=["linear_attention", "full_attention"]), sequence)
    for names in (("tp", "sp", "dp"), ("dp", "pp", "tp")):
        with pytest.raises(ValueError, match='among "dp", "sp", "tp", in this order'):
            parallelize_hla(model, init_device_mesh("cpu", (1, 1, 4), mesh_dim_names=names))
    mixed = make_model()
    mixed.model.norm.bfloat16()
    with pytest.raises(ValueError, match="all parameters in one dtype"):
        parallelize_hla(mixed, mesh)
    with pytest.raises(TypeError, match="model must be"):
        parallelize_hla(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(TypeError, match="mesh must be"):
        parallelize_hla(model, groups[4])
    with pytest.raises(TypeError, match="reduce_dtype must be"):
        parallelize_hla(model, mesh, reduce_dtype="float32")
    with pytest.raises(TypeError, match="activation_checkpointing must be"):
        parallelize_hla(model, mesh, activation_checkpointing="full")
    with pytest.raises(TypeError, match="compile must be"):
        parallelize_hla(model, mesh, compile=1)
    for function in (full_state_dict, lambda m: clip_grad_norm(m, 1.0)):
        with pytest.raises(ValueError, match="model must come from parallelize_hla"):
            function(model)
    # Nothing of that has changed the models.
    assert two_heads.model.layers[0].mixer.num_heads == model.model.layers[0].mixer.num_heads == 4
    parallelize_hla(model, mesh)
    with pytest.raises(ValueError, match="parallel already"):
        parallelize_hla(model, mesh)
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_grad_norm(model, 0.0)


def test_refusals(run):
    run(check_refusals)


def test_the_example_runs_and_its_folder_is_a_model(tmp_path):
    losses = run_snippet(PAGE, "# spread.py", 4, tmp_path)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], losses
    model = hla.HLAForCausalLM.from_pretrained(tmp_path / "spread")
    torch.manual_seed(0)
    hla.HLAForCausalLM(model.config)  # draws what the script drew before its batch
    ids = torch.randint(100, (2, 1000))
    assert model(input_ids=ids, labels=ids).loss < losses[2]  # what it became after its last step
