"""A token on a CPU in few operations: what the layer computes operation by operation, in output and state."""

import pytest
import torch

from hla import one_token
from hla.layer_state import map_state
from tests.test_layers import assert_states_close, close, every_option, make_layer, tokens


@pytest.fixture
def taken(monkeypatch):
    """How many tokens went the short way."""
    calls = []

    def spy(*call, original=one_token.token):
        calls.append(1)
        return original(*call)

    monkeypatch.setattr(one_token, "token", spy)
    return calls


def copied(state):
    return map_state(torch.clone, state)


@every_option
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_short_way_is_the_layer(options, batch, taken):
    layer, x = make_layer(**options), tokens(batch, 9)
    _, state = layer(x[:, :5], output_state=True)
    in_place = copied(state)
    for t in range(5, 9):
        expected, state = layer(x[:, t : t + 1], state=state, output_state=True)
        y, returned = layer(x[:, t : t + 1], state=in_place, out_state=in_place)
        assert returned is in_place
        close(y, expected, 1e-12)
        assert_states_close(in_place, state)
    assert len(taken) == (4 if layer.rope_theta is None else 0)


@pytest.mark.parametrize(
    "options", [{}, {"ridge": 0.5, "head_v_dim": 5, "scale": 0.3}, {"nodes": "token", "ridge": "head"}]
)
@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.no_grad()
def test_pieces_of_heads_give_what_all_heads_give(options, batch, monkeypatch):
    """Two heads of four to a piece, and at most four pieces: three sequences have too many."""
    layer, x = make_layer(**options), tokens(batch, 9)
    _, state = layer(x[:, :5], output_state=True)
    whole, cut = copied(state), copied(state)
    monkeypatch.setattr(one_token, "PIECE", 80)
    pieces = []

    def spy(*call, original=one_token._update_in_pieces):
        pieces.append(1)
        return original(*call)

    monkeypatch.setattr(one_token, "_update_in_pieces", spy)
    for t in range(5, 9):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        expected, _ = layer(x[:, t : t + 1], state=whole, out_state=whole)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        y, _ = layer(x[:, t : t + 1], state=cut, out_state=cut)
        close(y, expected, 1e-12)
        assert_states_close(cut, whole)
    assert len(pieces) == (4 if batch < 3 else 0)


@torch.no_grad()
def test_float32_is_close_to_float64(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    outputs = []
    for dtype in (torch.float64, torch.float32):
        layer, x = make_layer().to(dtype), tokens(2, 40).to(dtype)
        state = layer.zero_state(2, dtype, "cpu")
        outputs.append(torch.cat([layer(x[:, t : t + 1], state=state, out_state=state)[0] for t in range(40)], 1))
    close(outputs[1].double(), outputs[0], 2e-5)


@torch.no_grad()
def test_what_does_not_fit_goes_the_long_way(taken):
    """A mask, two tokens, a state in other tensors or another form; and a state of another shape is still refused."""
    layer, x = make_layer(torch.float32), tokens(2, 2, torch.float32)
    start = layer.zero_state(2, torch.float32, "cpu")
    other = copied(start)
    packed = start._replace(op=start.op.pack())
    half = start._replace(op=map_state(torch.Tensor.bfloat16, start.op))
    layer(x[:, :1], attention_mask=torch.ones(2, 1), state=start, out_state=start)
    layer(x, state=start, out_state=start)
    layer(x[:, :1], state=start, out_state=other)
    for state in (packed, half):
        layer(x[:, :1], state=state, out_state=state)
    with torch.enable_grad():
        y, _ = layer(x[:, :1], state=other, out_state=other)
    assert y.requires_grad
    with pytest.raises(ValueError, match="state.S"):
        wrong = start._replace(op=start.op._replace(S=start.op.S[:, :3]))
        layer(x[:, :1], state=wrong, out_state=wrong)
    assert not taken
    layer(x[:, :1], state=start, out_state=start)
    assert len(taken) == 1
