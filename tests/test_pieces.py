"""A sequence trained piece by piece has the loss and the gradients of the whole sequence."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import hla
from hla.build import recompute_activations
from hla.pieces import backward_in_pieces
from tests.ops.cases import assert_close

SMALL = {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}


def new(**options):
    return hla.HLAForCausalLM(hla.HLAConfig(**SMALL, **options)).double().train()


def batch(length=37):
    ids = torch.randint(30, (2, length))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets[0, 5:9] = -100
    return ids, targets


@pytest.mark.parametrize("piece", [1, 10, 37, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rope": True, "num_key_value_heads": 2},
        {"conv_size": 0},
        {"op": "hla2"},
        {"op": "hla3", "decay": "none"},
    ],
    ids=["default", "rope, grouped", "no convolution", "hla2", "hla3"],
)
def test_gradients_are_those_of_the_whole_sequence(options, piece):
    model, (ids, targets) = new(**options), batch()
    expected = model(input_ids=ids, shift_labels=targets, use_cache=False).loss
    expected.backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = backward_in_pieces(model, ids, targets, piece=piece)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    # Both losses are computed in float32; what differs is their rounding.
    for name, p in model.named_parameters():
        assert_close(p.grad, truth[name], 1e-5, name)


def test_they_are_exact(monkeypatch):
    """To float64 rounding, once the loss is float64 too; gradients add up; layers may be checkpointed."""
    model, (ids, targets) = new(), batch(50)
    exact = lambda hidden, head, wanted: F.cross_entropy(head(hidden), wanted, reduction="sum")  # noqa: E731
    monkeypatch.setattr("hla.pieces.summed_cross_entropy", exact)
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters()}
    backward_in_pieces(model, ids, targets, piece=16)  # onto the gradient that is there
    for name, p in model.named_parameters():
        assert_close(p.grad, 2 * truth[name], 1e-10, name)
    recompute_activations(model)
    model.zero_grad()
    backward_in_pieces(model, ids, targets, piece=16)
    for name, p in model.named_parameters():
        assert_close(p.grad, truth[name], 1e-10, name)
    assert not any(block.mixer._forward_hooks or block.mixer._forward_pre_hooks for block in model.model.layers)


def test_layers_at_the_bottom_may_be_frozen():
    model, (ids, targets) = new(), batch()
    for part in (model.model.embed_tokens, model.model.layers[0]):
        part.requires_grad_(False)
    model(input_ids=ids, shift_labels=targets, use_cache=False).loss.backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    backward_in_pieces(model, ids, targets, piece=10)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, truth[name], 1e-5, name)
        else:
            assert p.grad is None


def test_what_is_refused():
    ids, targets = batch()
    reentrant = new()
    reentrant.gradient_checkpointing_enable({"use_reentrant": True})
    for message, model, arguments in (
        ("softmax", new(layer_types=["linear_attention", "full_attention"]), (ids, targets, 8)),
        ("piece must be", new(), (ids, targets, 0)),
        ("one shape", new(), (ids, targets[:, :-1], 8)),
        ("use_reentrant", reentrant, (ids, targets, 8)),
    ):
        with pytest.raises(ValueError, match=message):
            backward_in_pieces(model, *arguments[:2], piece=arguments[2])


def test_the_page():
    page = Path(__file__).parents[1] / "docs" / "training-speed.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    assert all(p.grad is not None for p in names["model"].parameters()) and names["loss"] > 4
