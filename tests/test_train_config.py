import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hla.cli import app
from hla.errors import HLAError
from hla.train_config import FIXED, TrainConfig, check_resumed, config_text, read_config, resolve
from tests.text_helpers import MICRO, write_corpus


def read(folder: Path, text: str) -> dict:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


texts = st.text(st.characters(exclude_categories=["Cs"]))
options = st.dictionaries(st.text("abc.-é \"\n", min_size=1), st.booleans() | st.integers(-(1 << 60), 1 << 60) | texts
                          | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.integers(0, 9)))  # fmt: skip


@given(
    data=st.lists(texts, max_size=3), lr=st.floats(1e-12, 1e12), minutes=st.none() | st.floats(0.1, 1e4), model=options
)
def test_what_is_written_is_read_back(data, lr, minutes, model, tmp_path_factory):
    config = TrainConfig(
        data=tuple(data), weights=(0.25,) * len(data), lr=lr, minutes=minutes, model=model, steps=7, compile=True
    )
    assert TrainConfig(**read(tmp_path_factory.mktemp("toml"), config_text(config))) == config


def test_every_setting_but_how_to_start_is_saved():
    names = {f.name for f in dataclasses.fields(TrainConfig)} - {"overwrite", "resume", "dp", "sp", "tp", "shard"}
    shown = config_text(TrainConfig(minutes=1.0, steps=1, cuda_graphs=True, model={"op": "ahla"}))
    assert {line.split(" = ")[0] for line in shown.splitlines() if " = " in line} - {"op"} == names - {"model"}
    assert "[model]" in shown


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("learning_rate = 1", "unknown setting 'learning_rate'"),
        ("batch_sise = 4", "unknown setting 'batch_sise'; did you mean 'batch_size'?"),
        ("steps = 2.5", "steps must be a whole number, not 2.5"),
        ("steps = true", "steps must be a whole number, not True"),
        ('lr = "fast"', "lr must be a number, not 'fast'"),
        ("data = 3", "data must be text, not 3"),
        ("compile = 1", "compile must be true or false, not 1"),
        ("cuda_graphs = 1", "cuda_graphs must be true or false, not 1"),
        ("model = 3", "model must be a table"),
        ("lr = ", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_sentence(text, sentence, tmp_path):
    with pytest.raises(HLAError) as error:
        read(tmp_path, text)
    assert sentence in str(error.value) and "settings.toml" in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(HLAError, match="cannot read the configuration"):
        read_config(tmp_path / "no.toml")


def test_flags_win_over_the_file_and_that_over_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('lr = 1e-3\nsteps = 7\ndata = "a.txt"\n[model]\nop = "ahla"\nhidden_size = 64\n')
    config = resolve({"lr": 2e-3, "model": {"op": "hla2"}}, file)
    assert (config.lr, config.steps, config.data, config.batch_size) == (2e-3, 7, ("a.txt",), TrainConfig.batch_size)
    assert config.model == {"op": "hla2", "hidden_size": 64}


def test_a_run_that_goes_on_is_the_same_run():
    saved = TrainConfig(data=("a",))
    check_resumed(dataclasses.replace(saved, steps=7, lr=0.1, save_every=3, out="elsewhere"), saved)
    other = {"data": ("b",), "weights": (1.0,), "model": {"op": "ahla"}, "size": "small", "attention": "softmax",
             "tokenizer": "bytes", "dtype": "bfloat16", "recompute": True, "compile": True}  # fmt: skip
    for name in FIXED:
        with pytest.raises(HLAError, match=f"has {name} = "):
            check_resumed(dataclasses.replace(saved, **{name: other.get(name, 77)}), saved)


def test_the_command_takes_a_file_flags_and_its_own_record(tmp_path, monkeypatch):
    """What a run saves of its settings is a file that makes the same run again."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    table = "\n".join(f"{name} = {value}" for name, value in MICRO.items())
    lines = f'tokenizer = "bytes"\ncontext = 32\nbatch_size = 2\nsteps = 9\ndevice = "cpu"\n[model]\n{table}\n'
    Path("run.toml").write_text('data = "corpus"\n' + lines)

    def train(*options: str) -> list[dict]:
        result = CliRunner().invoke(app, ["train", *options])
        assert result.exit_code == 0, result.stderr
        out = Path(options[options.index("--out") + 1])
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    first = train("--config", "run.toml", "--out", "one", "--steps", "2", "--lr", "0.01", "--no-compile")
    saved = read_config(Path("one/train.toml"))
    assert (saved["steps"], saved["lr"], saved["context"]) == (2, 0.01, 32) and saved["model"] == MICRO
    assert saved["data"] == (str(tmp_path / "corpus"),)
    again = train("--config", "one/train.toml", "--out", "two")
    losses = [[r["loss"] for r in records if "loss" in r] for records in (first, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    result = CliRunner().invoke(app, ["train", "--config", "run.toml", "--out", "three", "--weights", "a,b"])
    assert result.exit_code == 1 and "--weights takes numbers" in result.stderr
