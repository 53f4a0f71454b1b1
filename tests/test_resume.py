"""Going on from states: pieces, branches, steps back, the commands, and the page about it."""

import copy
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hla import generate
from hla.cli import app
from hla.data import build_tokenizer
from hla.errors import HLAError
from hla.generate import Snapshots, read, stream
from hla.models import HLACache
from hla.models.state_file import read_state
from tests.test_cache import VOCAB, close, random_ids
from tests.test_state_files import same, tensors_of, tiny
from tests.text_helpers import micro_config, write_corpus

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def state_file(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("states") / "a.state"
    read(model, random_ids(1, 20))[0].save(path)
    return path


# -- reading, going on, branching -----------------------------------------------------------------------------------


def record_lengths(model):
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths, hook


def test_a_prompt_is_read_in_pieces_that_end_at_fixed_places():
    model, ids = tiny(dtype=torch.float64), random_ids(2, 50)
    lengths, hook = record_lengths(model)
    done = []
    cache, logits = read(model, ids, piece=16, progress=done.append)
    assert lengths == [16, 16, 16, 2] and done == [16, 32, 48, 50]
    close(logits, model(input_ids=ids).logits[:, -1])
    assert torch.equal(cache.next_logits, logits)
    lengths.clear()
    again, _ = read(model, ids[:, :32], piece=16)
    read(model, ids[:, 32:], cache=again, piece=16)
    same(again, cache)
    other, _ = read(model, ids[:, :5], piece=16)
    lengths.clear()
    read(model, ids[:, 5:], cache=other, piece=16)
    assert lengths == [11, 16, 16, 2]
    hook.remove()
    with pytest.raises(ValueError, match="piece"):
        read(model, ids, piece=0)
    with pytest.raises(HLAError, match="the prompt is empty"):
        read(model, [])


def test_any_other_use_of_a_model_clears_the_logits(model):
    cache, _ = read(model, [1, 2])
    model(random_ids(1, 1), past_key_values=cache)
    assert cache.next_logits is None
    with pytest.raises(HLAError, match="the prompt is empty"):
        next(stream(model, [], max_tokens=1, cache=cache))
    cache, _ = read(model, [1, 2])
    cache.reset()
    assert cache.next_logits is None and int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 3}, {"seed": 4, "top_k": 9}], ids=str)
@pytest.mark.parametrize("written", [0, 1, 7])
def test_an_interrupted_text_goes_on_as_it_would_have(sampling, written, model, tmp_path):
    ids = random_ids(1, 10)[0].tolist()
    whole = list(stream(model, ids, max_tokens=20, **sampling))
    assert len(set(whole)) > 3
    cache = HLACache(model.config)
    if written:
        begun = list(stream(model, ids, max_tokens=written, cache=cache, **sampling))
        assert begun == whole[:written]
        read(model, begun[-1:], cache=cache)
    else:
        read(model, ids, cache=cache)
    cache.save(tmp_path / "a")
    for _ in range(2):
        loaded = HLACache.load(tmp_path / "a", model)
        assert int(loaded.get_seq_length()) == 10 + written
        assert list(stream(model, [], max_tokens=20 - written, cache=loaded, **sampling)) == whole[written:]


def test_a_second_prompt_follows_the_first(model, state_file):
    first, second = random_ids(1, 20)[0].tolist(), random_ids(1, 6, seed=5)[0].tolist()
    expected = list(stream(model, first + second, max_tokens=15, temperature=0))
    assert list(stream(model, second, max_tokens=15, temperature=0, cache=HLACache.load(state_file))) == expected


@pytest.mark.parametrize(
    "options", [{}, {"layer_types": ["full_attention", "linear_attention"]}], ids=["hla", "hybrid"]
)
@pytest.mark.parametrize("how", ["copy", "deepcopy", "load"])
def test_branches_do_not_disturb_each_other(options, how, tmp_path):
    model = tiny(**options)
    cache, _ = read(model, random_ids(1, 20))
    cache.save(tmp_path / "a")
    kept = [x.clone() for x in [*tensors_of(cache), cache.next_logits]]
    make = {"copy": cache.copy, "deepcopy": lambda: copy.deepcopy(cache), "load": lambda: HLACache.load(tmp_path / "a")}
    branches = [make[how]() for _ in range(3)]
    branches[0].save(tmp_path / "b")  # a copy knows the model, too
    alone = [list(stream(model, [], max_tokens=9, seed=i, cache=HLACache.load(tmp_path / "a"))) for i in range(3)]
    streams = [stream(model, [], max_tokens=9, seed=i, cache=branch) for i, branch in enumerate(branches)]
    together = list(zip(*streams, strict=True))  # one token of each in turn
    assert [list(x) for x in zip(*together, strict=True)] == alone and alone[0] != alone[1]
    for x, y in zip(kept, [*tensors_of(cache), cache.next_logits], strict=True):
        assert torch.equal(x, y)


def test_many_continuations_in_one_batch(model, state_file):
    cache = HLACache.load(state_file, model)
    cache.batch_repeat_interleave(3)
    new = random_ids(3, 4, seed=6)
    assert cache.next_logits.shape == (3, VOCAB)
    with pytest.raises(HLAError, match="3 sequences"):
        next(stream(model, [], max_tokens=1, cache=cache.copy()))
    _, logits = read(model, new, cache=cache)
    for i in range(3):
        _, alone = read(model, new[i : i + 1], cache=HLACache.load(state_file, model))
        torch.testing.assert_close(logits[i : i + 1], alone)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.next_logits, logits[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.next_logits, logits[:1])


# -- stepping back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"layer_types": ["full_attention", "linear_attention"]}], ids=["hla", "hybrid"]
)
def test_stepping_back_is_a_fresh_read_of_the_prefix(options, files, tmp_path):
    model, ids = tiny(**options), random_ids(1, 50)[0].tolist()
    kept = Snapshots(16, keep=None, files=tmp_path / "s" if files else None)
    read(model, ids, piece=8, snapshots=kept)
    assert kept.positions == [0, 16, 32, 48] and kept.position == 50
    lengths, hook = record_lengths(model)
    for position, again in ((50, 2), (49, 1), (48, 0), (41, 9), (33, 1), (32, 0), (5, 5), (0, 0)):
        lengths.clear()
        back = kept.step_back(model, position, piece=8)
        assert sum(lengths) == again and int(back.get_seq_length()) == position == kept.position
        assert max(kept.positions) == position // 16 * 16
        if position:
            fresh, logits = read(model, ids[:position], piece=8)
            same(back, fresh)
            assert torch.equal(back.next_logits, logits)
    hook.remove()
    assert [p.name for p in tmp_path.iterdir()] == []  # the files went with what was forgotten


def test_stepping_back_within_what_was_written(model):
    ids = random_ids(1, 10)[0].tolist()
    kept = Snapshots(8)
    cache = HLACache(model.config)
    written = list(stream(model, ids, max_tokens=30, seed=1, cache=cache, snapshots=kept))
    assert kept.position == 39 and kept.positions == [0, 8, 16, 24, 32]
    back = kept.step_back(model, 21)
    fresh, logits = read(model, (ids + written)[:21])
    torch.testing.assert_close(back.next_logits, logits, atol=1e-4, rtol=1e-4)
    for x, y in zip(tensors_of(back), tensors_of(fresh), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    # and another text goes on from there, with snapshots of its own
    other = list(stream(model, [], max_tokens=8, seed=2, cache=back, snapshots=kept))
    assert kept.position == 28 and kept.positions == [0, 8, 16, 24]
    assert int(kept.step_back(model, 24).get_seq_length()) == 24
    expected, _ = read(model, (ids + written)[:21] + other[:3])
    for x, y in zip(tensors_of(kept.step_back(model, 24)), tensors_of(expected), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("files", [False, True])
def test_snapshots_are_bounded(files, model, tmp_path):
    kept = Snapshots(4, keep=3, files=tmp_path / "s" if files else None)
    cache, _ = read(model, random_ids(1, 30), snapshots=kept)
    assert kept.positions == [20, 24, 28]
    if files:
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"s.{p:09d}" for p in (20, 24, 28)]
        assert HLACache.load(tmp_path / "s.000000024", model).get_seq_length() == 24
    else:
        assert [x.nbytes() for x in kept._states.values()] == [cache.nbytes()] * 3
    for position in (19, 31):
        with pytest.raises(HLAError, match=f"cannot step back to token {position}: there are snapshots for 20 to 30"):
            kept.step_back(model, position)


def test_snapshots_of_a_loaded_state_begin_there(model, state_file):
    kept = Snapshots(8)
    cache = HLACache.load(state_file)
    read(model, random_ids(1, 10, seed=2), cache=cache, snapshots=kept)
    assert kept.positions == [20, 24]
    back = kept.step_back(model, 22)
    fresh, _ = read(model, random_ids(1, 10, seed=2)[:, :2], cache=HLACache.load(state_file))
    same(back, fresh)
    same(kept.step_back(model, 20), HLACache.load(state_file))
    written = Snapshots(8)  # also where there is no prompt to read
    list(stream(model, [], max_tokens=6, cache=HLACache.load(state_file), snapshots=written))
    assert written.positions == [20, 24] and written.position == 25
    with pytest.raises(HLAError, match="cannot step back to token 19"):
        kept.step_back(model, 19)


def test_snapshots_follow_one_text(model):
    kept = Snapshots(8)
    cache, _ = read(model, [1, 2, 3], snapshots=kept)
    for other in (None, read(model, [1, 2])[0]):
        with pytest.raises(ValueError, match="another text"):
            read(model, [4], cache=other, snapshots=kept)
    read(model, [4], cache=cache, snapshots=kept)
    with pytest.raises(ValueError, match="one sequence"):
        read(model, random_ids(2, 3), snapshots=Snapshots(8))
    for wrong in ({"every": 0}, {"every": 1, "keep": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Snapshots(**wrong)


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two models of the demo's kind and a state."""
    from hla.checkpoint import save_model
    from hla.train import train

    root = tmp_path_factory.mktemp("place")
    tokenizer = build_tokenizer("bytes", 0, [])
    for name, seed in (("demo", 0), ("other", 1)):
        model = tiny(seed, vocab_size=257, eos_token_id=256)
        save_model(root / "runs" / name, model, tokenizer, {})
    train(micro_config(write_corpus(root / "corpus"), root / "softmax", steps=1, attention="softmax"))
    (root / "book.txt").write_text("Once upon a time " * 20)
    return root


def run(*arguments, stdin="", code=0):
    result = RUNNER.invoke(app, ["generate", *map(str, arguments)], input=stdin)
    assert result.exit_code == code, result.stderr
    return result.stdout if code == 0 else " ".join(result.stderr.split())


@pytest.fixture
def here(place, tmp_path, monkeypatch) -> Path:
    """An empty folder beside which the models are."""
    (tmp_path / "runs").symlink_to(place / "runs")
    (tmp_path / "softmax").symlink_to(place / "softmax")
    (tmp_path / "book.txt").symlink_to(place / "book.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("sampling", [["--greedy"], ["--seed", "5"]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("model", ["runs/demo", "softmax"])
def test_commands_go_on_where_they_stopped(model, sampling, here):
    whole = run(model, "Once", "--max-tokens", 24, *sampling)
    text = run(model, "Once", "--max-tokens", 0, "--save-state", "s", *sampling)
    assert text == ""  # a book that was only read is not shown
    text = "Once"
    for tokens in (1, 14, 9):
        text += run(model, "--load-state", "s", "--save-state", "s", "--max-tokens", tokens, *sampling)[:-1]
    # what ends within a character shows as a replacement character: compare the rest
    assert [c for c in text if c != "\ufffd"] == [c for c in whole[:-1] if c != "\ufffd"]
    assert int(HLACache.load("s").get_seq_length()) == 5 + 24


def test_weights_have_the_dtype_of_the_state_or_the_one_asked_for(here):
    halves = ["--greedy", "--max-tokens", 20, "--dtype", "bfloat16"]
    whole = run("runs/demo", "Once", *halves)
    run("runs/demo", "Once", "--max-tokens", 0, "--save-state", "s", "--dtype", "bfloat16")
    assert read_state("s")[1].dtype == "bfloat16" and HLACache.load("s").next_logits.dtype == torch.bfloat16
    assert "Once" + run("runs/demo", "--load-state", "s", "--greedy", "--max-tokens", 20) == whole
    told = run("runs/demo", "--load-state", "s", "--dtype", "float32", code=1)
    assert "the weights were bfloat16 and are float32: load the model with the dtype of the state" in told
    run("runs/demo", "Once", "--max-tokens", 0, "--save-state", "s")
    assert read_state("s")[1].dtype == "float32"  # there is no GPU


def test_a_prompt_follows_the_state(here):
    run("runs/demo", "--file", "book.txt", "--max-tokens", 0, "--save-state", "s")
    text = (here / "book.txt").read_text()
    whole = run("runs/demo", text + " The end", "--max-tokens", 20, "--greedy")
    for options, stdin in ((["--load-state", "s", " The end"], ""), (["--load-state", "s", "-"], " The end\n")):
        assert text + run("runs/demo", *options, "--max-tokens", 20, "--greedy", stdin=stdin) == whole


def test_a_state_includes_the_stop_string_and_the_end(here):
    written = run("runs/demo", "Once", "--seed", 1, "--max-tokens", 20)
    run("runs/demo", "Once", "--seed", 1, "--max-tokens", 20, "--save-state", "s", "--stop", written[7])
    seen = int(HLACache.load("s").get_seq_length())
    assert 5 < seen < 5 + 20


def test_snapshots_are_files_beside_the_state(here):
    run("runs/demo", "Once upon", "--max-tokens", 20, "--save-state", "s", "--snapshots", 8, "--seed", 1)
    names = ["s", "s.000000008", "s.000000016", "s.000000024"]
    assert sorted(p.name for p in here.glob("s*") if p.is_file() and p.name[:2] in ("s", "s.")) == names
    assert [int(HLACache.load(name).get_seq_length()) for name in names] == [30, 8, 16, 24]
    whole = run("runs/demo", "Once upon", "--max-tokens", 20, "--seed", 1)
    rest = run("runs/demo", "--load-state", "s.000000016", "--max-tokens", 14, "--seed", 1)
    assert rest.split("\ufffd")[-1] and whole.endswith(rest.lstrip("\ufffd"))


WRONG = [
    (["runs/demo", "--load-state", "missing"], "cannot read the state file 'missing': No such file"),
    (["runs/demo", "--load-state", "book.txt"], "no state file at all"),
    (["runs/other", "--load-state", "s"], "was made with another model: made with 'runs/demo' ("),
    (["runs/demo", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
    (["runs/demo", "x", "--snapshots", "4"], "--snapshots needs --save-state"),
    (["runs/demo", "x", "--save-state", "t", "--snapshots", "0"], "--snapshots must be at least 1"),
    (["runs/demo", "--load-state", "s", "--save-state", "t", "--max-tokens", "0"], "does nothing"),
    (["runs/demo", "--load-state", "s", "--max-tokens", "0"], "max_tokens must be at least 1"),
    (["runs/demo", "x", "--save-state", "runs"], "it is a folder"),
    (["runs/demo", "x", "--save-state", "no/t"], "its folder does not exist"),
    (["runs/demo", "", "--load-state", "s"], "the prompt is empty"),
    (["runs/demo", "x", "--save-state", "t", "--temperature", "-1"], "temperature"),
    (["runs/demo", "x", "--dtype", "float16"], "dtype must be auto, float32 or bfloat16, not 'float16'"),
]


def test_contradictions_end_in_one_sentence(here):
    run("runs/demo", "Once", "--max-tokens", 0, "--save-state", "s")
    for arguments, sentence in WRONG:
        told = run(*arguments, code=1)
        assert told.startswith("hla: ") and sentence in told, told
    assert not (here / "t").exists()


def test_only_models_with_states_have_them(here):
    from transformers import GPT2Config, GPT2LMHeadModel

    from hla.checkpoint import save_model

    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=8, n_layer=1, n_head=1, eos_token_id=256))
    save_model(here / "gpt2", model, build_tokenizer("bytes", 0, []), {})
    assert run("gpt2", "Once", "--max-tokens", 4, "--seed", 1).startswith("Once")
    for option in (["--save-state", "t"], ["--load-state", "t"]):
        assert "only HLA models have states" in run("gpt2", "Once", *option, code=1)


def test_long_prompts_are_read_under_a_bar(here, monkeypatch):
    from hla.cli import _reading

    monkeypatch.setattr(generate, "PIECE", 8)
    with _reading(1000) as progress:  # nobody watches
        assert progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with _reading(16) as progress:
        assert progress is None
    with _reading(17) as progress:
        progress(8)


# -- the page -------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "generation.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_run(here):
    commands = re.findall(r"^    hla (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    shown = []
    for command in commands:
        result = RUNNER.invoke(app, shlex.split(command))
        assert result.exit_code == 0, result.stderr
        shown.append(result.stdout)
    assert shown[0] == "" and shown[1].startswith("And then the President said")
    whole = run("runs/demo", "--load-state", "book.state", "--max-tokens", 80, "--seed", 1)
    parts = shown[2][:-1] + shown[3]
    assert [c for c in parts if c != "\ufffd"] == [c for c in whole if c != "\ufffd"]


def test_the_python_of_the_page_runs(here, capsys):
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert len(names["ids"]) and names["logits"].shape == (2, 257)
    assert "bytes per snapshot" in capsys.readouterr().out
