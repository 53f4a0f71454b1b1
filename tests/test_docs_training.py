"""The commands of docs/training.md run as they stand there, in order, on a small corpus and with a small model."""

import json
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from hla.cli import app
from hla.models import SIZES
from hla.train_config import TrainConfig
from tests.text_helpers import MICRO, sentences, write_corpus

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, MICRO)
    write_corpus(tmp_path / "my_texts", words=200)
    lines = (json.dumps({"text": sentences(90, seed=i)}) + "\n" for i in range(20, 30))
    (tmp_path / "more.jsonl").write_text("".join(lines))
    (settings,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "run.toml").write_text(settings.replace("2000", "2").replace("512", "64"))
    commands = re.findall(r"^    hla (.*)", PAGE, re.M)
    assert len(commands) == 9
    for command in commands:
        command = re.sub(r"--vocab-size \d+", "--vocab-size 300", command)
        arguments = shlex.split(command.replace("3000", "3"))
        if arguments[0] == "train":
            arguments += [] if "--resume" in arguments or "--config" in arguments else ["--steps=2", "--context=64"]
            arguments += ["--device=cpu"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"hla {command}\n{result.output}"
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(compile(block, "docs/training.md", "exec"), names)
    assert [step for step, *_ in names["growth"]] == [1] and min(names["growth"][0]) > 0


def test_the_page_names_options_and_sizes_that_exist():
    result = CliRunner().invoke(app, ["train", "--help"], terminal_width=200, env={"COLUMNS": "200"})
    help_of_all = result.output + CliRunner().invoke(app, ["tokenize", "--help"], env={"COLUMNS": "200"}).output
    of_torchrun = {"--nproc-per-node", "--max-restarts", "--shutdown-timeout"}
    options = set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--help"} - of_torchrun
    assert len(options) > 12 and all(option in help_of_all for option in options)
    assert all(re.search(rf"\b{name}\s+[0-9.]+[MB]", PAGE) for name in SIZES)
    assert f"in a row ({TrainConfig.max_skipped})" in PAGE
