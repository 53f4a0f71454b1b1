"""A model on pieces of a sequence: loss, logits, gradients after a sum over ranks, and a prompt read in parallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import hla
from hla.distributed import SequenceParallel, shard_sequence
from tests.ops.cases import F64, assert_close

VOCAB = 31
LOSS = 1e-6  # transformers computes losses in float32, of float64 logits too


def make_model(**options):
    torch.manual_seed(0)
    config = hla.HLAConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **options
    )
    return hla.HLAForCausalLM(config).to(F64).train()


def batch_of(B: int, T: int, **more):
    ids = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, 3:6] = -100
    return {"input_ids": ids, "labels": labels, **more}


def check(groups, rank, batch, options, lengths=None, checkpointing=False, items=None):
    model = make_model(**options)
    whole = model(**batch, num_items_in_batch=items)
    whole.loss.backward()
    truth = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    parallel = SequenceParallel(groups[4], lengths)
    model.set_sequence_parallel(parallel)
    if checkpointing:
        model.gradient_checkpointing_enable()
    piece = shard_sequence(batch, parallel)
    out = model(**piece, num_items_in_batch=items)
    assert_close(out.loss, whole.loss, LOSS, "loss")
    out.loss.backward()
    span = parallel.span(piece["input_ids"].shape[1])
    logits = whole.logits[:, span]
    assert_close(out.logits[:, : logits.shape[1]], logits, 1e-11, "logits")
    for n, p in model.named_parameters():
        grad = p.grad.contiguous()
        dist.all_reduce(grad, group=groups[4])
        assert_close(grad, truth[n], 10 * LOSS, f"gradient of {n}")


@pytest.mark.parametrize("options", [{}, {"op": "hla2", "decay": "token"}], ids=["default", "hla2"])
@pytest.mark.parametrize("length", [32, 30, 9])
def test_loss_and_gradients(run, options, length):
    """(30 and 9 are padded to the next multiple of 4.)"""
    run(check, batch_of(2, length), options)


def test_unequal_pieces(run):
    run(check, batch_of(1, 20), {}, [3, 0, 12, 5])


def test_gradient_checkpointing(run):
    run(check, batch_of(1, 24), {}, None, True)


def test_num_items_in_batch(run):
    run(check, batch_of(1, 24), {}, None, False, 17)


def test_packed_documents(run):
    borders = torch.tensor([0, 5, 12, 18, 30])
    run(check, batch_of(1, 30, cu_seq_lens_q=borders), {})
    positions = torch.cat([torch.arange(int(n)) for n in borders.diff()])[None]
    run(check, batch_of(1, 30, position_ids=positions), {})
    run(check, batch_of(1, 30, position_ids=torch.arange(30)[None]), {})


def test_padded_rows(run):
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, :10] = 0
    batch = batch_of(2, 32, attention_mask=mask)
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    run(check_with_mask, batch)


def check_with_mask(groups, rank, batch):
    model = make_model()
    whole = model(**batch)
    parallel = SequenceParallel(groups[4])
    model.set_sequence_parallel(parallel)
    out = model(**shard_sequence(batch, parallel))
    assert_close(out.loss, whole.loss, LOSS, "loss")


def check_prompt(groups, rank):
    """Read a prompt on four ranks; its cache is whole on each, and one of them goes on alone."""
    model = make_model().eval()
    ids = batch_of(1, 24)["input_ids"]
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        parallel = SequenceParallel(groups[4])
        model.set_sequence_parallel(parallel)
        cache = model(**shard_sequence({"input_ids": ids[:, :20]}, parallel)).past_key_values
        assert int(cache.get_seq_length()) == 20
        model.set_sequence_parallel(None)
        found = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


def test_a_prompt_is_read_in_parallel(run):
    run(check_prompt)


def check_refusals(groups, rank):
    parallel = SequenceParallel(groups[4])
    model = make_model()
    model.set_sequence_parallel(parallel)
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="needs shift_labels"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="packed documents need cu_seq_lens_q"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]) + 8 * rank)
    with pytest.raises(ValueError, match="count on from the rank before"):
        model(input_ids=ids, position_ids=torch.arange(8)[None] + 1)
    with pytest.raises(ValueError, match="generate runs in one process"):
        model.generate(ids, max_new_tokens=1)
    mixed = make_model(layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match=r"layers \[1\] are full_attention"):
        mixed.set_sequence_parallel(parallel)
    with pytest.raises(ValueError, match="got colour"):
        shard_sequence({"input_ids": ids, "colour": ids}, parallel)
    with pytest.raises(ValueError, match="must have input_ids or inputs_embeds"):
        shard_sequence({"labels": ids}, parallel)
    with pytest.raises(ValueError, match=r"labels has shape \[1, 7\]"):
        shard_sequence({"input_ids": ids, "labels": ids[:, 1:]}, parallel)
    with pytest.raises(ValueError, match="lengths of the ranks add up to 10"):
        shard_sequence({"input_ids": ids}, SequenceParallel(groups[4], [1, 2, 3, 4]))
    two = torch.tensor([[0, 1, 0, 1]] * 2)
    with pytest.raises(ValueError, match="packed documents must be in one row"):
        shard_sequence({"input_ids": two, "position_ids": two}, parallel)


def test_refusals(run):
    run(check_refusals)


def check_data_parallel(groups, rank, kind):
    """The containers of PyTorch average over ranks what must be summed: the loss is to be multiplied."""
    batch = batch_of(1, 24)
    model = make_model()
    model(**batch).loss.backward()
    truth = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    parallel = SequenceParallel(groups[4])
    model.set_sequence_parallel(parallel)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=groups[4])
    else:
        mesh = DeviceMesh("cpu", torch.arange(4))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    (parallel.size * wrapped(**shard_sequence(batch, parallel)).loss).backward()
    for n, p in model.named_parameters():
        grad = p.grad.full_tensor() if kind == "fsdp" else p.grad
        assert_close(grad, truth[n], 10 * LOSS, f"gradient of {n}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_inside_ddp_and_fsdp(run, kind):
    run(check_data_parallel, kind)
