"""Attention maps of layers and models, and the page that shows them."""

import base64
import io
import re
import shutil
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import hla
from hla.cli import app
from hla.inspect import KINDS, Record, page, record, strongest, visible, watch, where_weight_lies
from hla.plots import Panel, attention_map, curves, strips
from hla.train import train
from tests.text_helpers import micro_config, write_corpus

RUNNER = CliRunner()
LAYERS = {
    "the default": {},
    "nodes and ridge per token": {"nodes": "token", "ridge": "token", "order": 2},
    "constant ridge, no gates": {"ridge": 0.5, "nodes": "chebyshev", "write_gate": False, "decay": "none"},
    "first order": {"op": "linear_attn", "decay": "fixed"},
    "protecting": {"op": "hla2"},
    "published": {"op": "hla2", "p": "q", "ridge": 0, "gain": 1, "decay": "none"},
    "normalised": {"op": "hla2", "feature_map": "relu", "normalize": True, "p": "q", "ridge": 0, "gain": 1},
    "overwriting, own inner query": {"op": "ahla", "p": "proj", "ridge": "head", "gain": "token"},
    "third order": {"op": "hla3", "rope_theta": 100.0, "output_gate": False},
    "no norm, no convolution": {"op": "ahla", "output_norm": False, "conv_size": 0},
}


def watched(T: int = 11, **options) -> tuple[hla.HigherOrderLinearAttention, Record]:
    layer = hla.HigherOrderLinearAttention(32, num_heads=4, num_kv_heads=2, **options).double()
    with torch.no_grad(), watch(layer, kept := Record()):
        y, _ = layer(torch.randn(2, T, 32, dtype=torch.float64)[:1])
    assert torch.equal(y, kept.output)
    return layer, kept


@pytest.mark.parametrize("name", LAYERS)
def test_the_maps_reproduce_the_layer(name):
    """``A V`` through norm, gate and output projection is what the layer returned."""
    layer, kept = watched(**LAYERS[name])
    A = kept.weights()
    assert A.shape == (4, 11, 11) and not A.triu(1).any()
    with torch.no_grad():
        o = torch.einsum("htj,jhv->thv", A, kept.v[0].repeat_interleave(2, 1))[None]
        assert torch.allclose(o, kept.read(A), rtol=1e-12, atol=0)
        o = (o if layer.o_norm is None else layer.o_norm(o)).flatten(2)
        o = o if layer.gate_proj is None else o * F.silu(layer.gate_proj(kept.hidden))
        assert torch.allclose(layer.o_proj(o), kept.output, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_a_page(name, monkeypatch):
    drawn = []
    monkeypatch.setattr("hla.inspect.attention_map", lambda *_, **__: b"")
    monkeypatch.setattr("hla.inspect.curves", lambda panels, *_, **__: drawn.append(panels) or b"")
    monkeypatch.setattr("hla.inspect.strips", lambda panels, *_, **__: drawn.append(panels) or b"")
    kept = watched(**LAYERS[name])[1]
    text = page([kept], range(11), list("abcdefghijk"), "a model")
    assert f"Layer 0: {kept.op}" in text and "4 heads of width 8, 2 key heads" in text
    assert ("Spectrum of S</h3>" in text) == (kept.op in ("hla2", "hla3", "hla_q"))
    assert [len(panels) for panels in drawn] == [3, len(kept.gates())]
    for panel in drawn[0] + drawn[1]:
        assert np.isfinite(panel.values).all() and np.shape(panel.values) in ((2, 11), (4, 11)), panel.title


def small_model(**settings) -> hla.HLAForCausalLM:
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hla.HLAForCausalLM(hla.HLAConfig(**shape, **settings)).double().eval()


def test_the_maps_of_softmax_layers_reproduce_them_too():
    model = small_model(layer_types=["full_attention", "linear_attention"], num_key_value_heads=2)
    ids = torch.randint(0, 50, (13,)).tolist()
    softmax, linear = record(model, ids)
    assert (softmax.op, linear.op, linear.order) == ("softmax", "hla_q", 4)
    A = softmax.weights()
    assert not A.triu(1).any() and torch.allclose(A.sum(-1), torch.ones(4, 13, dtype=torch.float64))
    with torch.no_grad():
        y = model.model.layers[0].mixer.o_proj(softmax.read(A).flatten(2))
    assert torch.allclose(y, softmax.output, rtol=1e-9, atol=1e-12)
    assert softmax.spectrum()["rank"].shape == (2, 13)


def test_watching_leaves_no_trace():
    model = small_model()
    ids = torch.randint(0, 50, (1, 9))
    before = model(ids).logits
    record(model, ids[0].tolist())
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        assert not module._forward_hooks and not {"_operate", "_attend"} & set(vars(module))


@pytest.mark.parametrize("op", ["hla2", "hla3", "hla_q"])
def test_the_spectrum_is_that_of_the_operators_own_state(op):
    """At the last position; a g of some size tells the gate 2g of k~ from the gate g of hla_q."""
    layer, kept = watched(op=op)
    kept.options["g"] = -0.3 * torch.rand(1, 11, 2, dtype=torch.float64)
    _, state = getattr(hla, op)(kept.q, kept.k, kept.v, output_final_state=True, **kept.options)
    values = torch.linalg.eigvalsh(state.S[0])
    spectrum = kept.spectrum()
    assert spectrum["x"] == list(range(11))
    shares = values / values.sum(-1, keepdim=True)
    assert torch.allclose(spectrum["share"][:, -1], shares[:, -1])
    entropy = -(shares.clamp(min=1e-30) * shares.clamp(min=1e-30).log()).sum(-1)
    assert torch.allclose(spectrum["rank"][:, -1], entropy.exp())
    assert torch.allclose(spectrum["rank"][:, 0], torch.ones(2, dtype=torch.float64))  # one key, one direction
    if op == "hla_q":
        ridge = kept.options["ridge"][0, -1]
        inverted = state.S[0].repeat_interleave(2, 0) + ridge[:, None, None] * torch.eye(8, dtype=torch.float64)
        assert torch.allclose(spectrum["condition"][:, -1], torch.linalg.cond(inverted))
    else:
        assert torch.allclose(spectrum["condition"][:, 0], torch.ones(2, dtype=torch.float64))
        assert torch.allclose(spectrum["condition"][:, -1], values[:, -1] / values[:, 0], rtol=1e-6)


def test_the_gates_are_those_of_the_layer():
    layer, kept = watched(norm_eps=1e-12)
    panels = {panel.title: np.asarray(panel.values) for panel in kept.gates()}
    assert list(panels) == ["decay exp(g)", "write gate b", "ridge", "size of the output"]
    with torch.no_grad():
        write = torch.sigmoid(layer.write_proj(kept.hidden))[0].T
        decay = layer._log_decay(kept.hidden, None).exp()[0].T
    assert np.allclose(panels["write gate b"], write) and np.allclose(panels["decay exp(g)"], decay)
    # keys are of length 1 before the gate multiplies them by its root
    assert np.allclose(kept.k[0].square().sum(-1).T, write, rtol=1e-3)
    assert panels["ridge"].shape == (4, 11)
    assert np.allclose(panels["size of the output"], kept.o[0].square().mean(-1).sqrt().T)
    assert torch.equal(kept.nodes(), layer._nodes(kept.hidden))
    per_token = watched(nodes="token")[1]
    assert torch.allclose(per_token.nodes(), per_token.options["nodes"][0].mean(0))
    assert watched(op="hla2")[1].nodes() is None


def test_where_the_weight_lies():
    ids = [7, 8, 9, 7, 8, 7]
    identity, back = torch.eye(6), torch.diag(torch.ones(5), -1)
    copying = torch.zeros(6, 6)  # every token that has been there reads what came after it, back to back
    for t, j in ((3, 1), (4, 2), (5, 1), (5, 4)):
        copying[t, j] = -2.0
    repeats = torch.zeros(6, 6)
    for t, j in ((3, 0), (4, 1), (5, 0), (5, 3)):
        repeats[t, j] = 1.0
    shares = where_weight_lies(torch.stack([identity, back, copying, repeats]).double(), ids)
    table = [dict(zip([*KINDS, "negative"], row, strict=True)) for row in shares]
    assert table[0]["itself"] == 1 and table[0]["negative"] == 0 and table[0]["same token"] == 0
    assert table[1]["1 back"] == pytest.approx(5 / 6)
    assert table[2]["after the same token"] == 1 and table[2]["negative"] == pytest.approx(3 / 6)
    assert table[3]["same token"] == 1 and table[3]["after the same token"] == 0
    assert table[2]["2 to 3 back"] == pytest.approx(2 / 6) and table[2]["4 to 15 back"] == pytest.approx(0.5 / 6)
    assert np.isnan(where_weight_lies(identity[None].double(), range(6))[0][KINDS.index("same token")])


def test_what_a_position_reads_most():
    A = torch.tensor([[1.0, 9, 9], [1, 2, 9], [-4, 1, 2]])
    assert strongest(A, 2, ["a", "b", "c"], 2) == "a (0) -1.00, c (2) +0.50"
    assert strongest(A, 0, ["a", "b", "c"]) == "a (0) +1.00"
    assert visible(" a\n\t\r") == "·a⏎⇥␍" and visible("") == "∅"


# ----------------------------------------------------------------------------------------------------------- pictures


def pixels(png: bytes) -> np.ndarray:
    return np.round(matplotlib.image.imread(io.BytesIO(png)) * 255)[..., :3].astype(int)


def count(png: bytes, colour: tuple[int, int, int]) -> int:
    return int((pixels(png) == colour).all(-1).sum())


RED, BLUE, GREY = (103, 0, 31), (5, 48, 97), (235, 235, 235)


def test_signs_scales_and_what_cannot_be_read_show_in_an_attention_map(tmp_path):
    causal = np.array([[0.1, 0.0], [-3.0, 1.5]])
    by_row = attention_map(causal, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes() == by_row and list(tmp_path.iterdir()) == [tmp_path / "map.png"]
    cell = count(by_row, GREY)  # one cell of four, up to its borders
    assert cell > 10_000
    # the first row is full red; the colour bar has a little of both ends
    assert 0.95 * cell < count(by_row, RED) < 1.2 * cell and 0.95 * cell < count(by_row, BLUE) < 1.2 * cell
    by_map = attention_map(causal, scale="map")
    assert count(by_map, RED) < 0.2 * cell < 0.95 * cell < count(by_map, BLUE)
    assert count(attention_map(np.ones((2, 2))), GREY) < 0.1 * cell  # full attention: nothing is greyed out
    assert count(attention_map(np.zeros((2, 2))), RED) < 0.2 * cell


def test_pictures_take_any_text_and_number_of_heads():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd = ["$x_$", "漢", "\\frac", "·"]
        attention_map(np.random.randn(5, 4, 4), tokens=odd, names=list("abcde"), title="a $ b")
        strips([Panel(np.ones((20, 4)), "constant", log=True)], tokens=odd)
        curves([Panel(np.ones((12, 3)), "many"), Panel(np.ones((1, 3)), "one")], [0, 1, 2], names=list("abcdefghijkl"))


@pytest.mark.parametrize(
    "weights, keywords, message",
    [
        (np.ones((2, 3)), {}, r"must have shape \[T, T\]"),
        (np.ones((0, 0)), {}, "T and N at least 1"),
        (np.ones(3), {}, r"got \[3\]"),
        (np.ones((2, 2)), {"tokens": ["a"]}, "tokens must be 2 texts"),
        (np.ones((3, 2, 2)), {"names": ["a"]}, "names must be 3 texts"),
        (np.ones((2, 2)), {"scale": "column"}, "scale must be one of"),
    ],
)
def test_an_attention_map_refuses(weights, keywords, message):
    with pytest.raises(ValueError, match=message):
        attention_map(weights, **keywords)


# ------------------------------------------------------------------------------------------------------------ command


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model of one HLA and one softmax layer, texts, and a model of another kind."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("inspect")
    settings = {"num_hidden_layers": 2}
    train(micro_config(write_corpus(root / "corpus"), root / "model", attention="hla,softmax", model=settings, steps=1))
    (root / "text.txt").write_text("<b>ba & co</b> di ba co\n" * 8)
    (root / "one.txt").write_text("x")
    (root / "empty.txt").write_text("")
    (root / "binary.bin").write_bytes(bytes(range(256)))
    shutil.copytree(root / "model", root / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=1)).save_pretrained(root / "gpt2")
    return root


def test_the_page_is_whole_and_needs_nothing_else(place, tmp_path):
    model, text, out = str(place / "model"), str(place / "text.txt"), tmp_path / "deep" / "out"
    result = RUNNER.invoke(app, ["inspect", model, "--text", text, "--out", str(out), "--tokens", "12"])
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in out.iterdir()] == ["inspect.html"] and "inspect.html" in result.stderr
    page = (out / "inspect.html").read_text(encoding="utf-8")
    assert "2 layers on 13 tokens" in page and "Layer 0: hla_q of order 4" in page and "Layer 1: softmax" in page
    assert "&lt;start&gt;" in page and ">&lt;</span>" in page  # the text's own brackets are text
    assert not re.search(r"<script|https?://|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        picture = pixels(base64.b64decode(source.partition(",")[2]))
        assert picture.shape[0] > 200 and picture.std() > 5
    errors = [float(x) for x in re.findall(r"relative error of ([\d.e+-]+)\.<", page)]
    assert len(errors) == 2 and max(errors) < 1e-5


def test_standard_input_is_a_file_like_any_other(place, tmp_path, monkeypatch):
    monkeypatch.setattr("hla.inspect.page", lambda records, ids, tokens, name: f"{ids} {tokens}")
    model, text = str(place / "model"), place / "text.txt"
    for out, source, stdin in (("file", str(text), b""), ("input", "-", text.read_bytes())):
        arguments = ["inspect", model, "--text", source, "--out", str(tmp_path / out)]
        assert RUNNER.invoke(app, arguments, input=stdin).exit_code == 0
    by_file, by_input = ((tmp_path / out / "inspect.html").read_text() for out in ("file", "input"))
    assert by_file == by_input and "'<start>', '<', 'b', '>', 'b', 'a', ' '" in by_file


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("missing --text text.txt", "there is no model folder 'missing'"),
        ("corpus --text text.txt", "is not a model folder"),
        ("gpt2 --text text.txt", "'gpt2' is not an HLA model: its model_type is 'gpt2'"),
        ("model --text missing.txt", "there is no file or folder 'missing.txt'"),
        ("model --text empty.txt", "is empty"),
        ("model --text -", "standard input is empty"),
        ("model --text binary.bin", "is not UTF-8 text"),
        ("model --text one.txt", "the text is too short: it has 1 token"),
        ("model --text text.txt --tokens 1", "tokens must be from 2 to 512, not 1"),
        ("model --text text.txt --tokens 513", "tokens must be from 2 to 512, not 513"),
        ("model --text text.txt --device toaster", "unknown device 'toaster'"),
        ("model --text text.txt --tokens 2 --out text.txt", "cannot write to the output folder 'text.txt'"),
    ],
)
def test_a_wrong_input_ends_in_one_sentence(arguments, sentence, place, monkeypatch):
    monkeypatch.chdir(place)
    result = RUNNER.invoke(app, ["inspect", *arguments.split()])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("hla: ") and result.stderr.count("\n") == 1 and sentence in result.stderr
    assert not (place / "runs").exists()
