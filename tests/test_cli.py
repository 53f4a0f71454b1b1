import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.core import TyperOption
from typer.testing import CliRunner

from hla.cli import app
from hla.data import read_documents
from hla.evaluate import compressors
from hla.train import train
from tests.text_helpers import MICRO_OPTIONS, micro_config, write_corpus

RUNNER = CliRunner()
SMALL = [
    "--tokenizer",
    "bytes",
    "--context",
    "32",
    "--batch-size",
    "2",
    "--steps",
    "1",
    "--device",
    "cpu",
    *MICRO_OPTIONS,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus, a model, and everything that can be wrong with either."""
    root = tmp_path_factory.mktemp("place")
    write_corpus(root / "corpus")
    train(micro_config(root / "corpus", root / "model"))
    (root / "empty.txt").write_text("")
    (root / "blank.txt").write_text(" \n\t\n")
    (root / "binary.bin").write_bytes(bytes(range(256)))
    (root / "short.txt").write_text("only a few words, not even a context of 512 tokens")
    (root / "word.txt").write_text("word")
    (root / "no text").mkdir()
    (root / "no text" / "picture.png").write_bytes(b"\x89PNG\0")
    (root / "empty folder").mkdir()
    (root / "in use").mkdir()
    (root / "in use" / "notes.txt").write_text("mine")
    wrong = ("truncated", "garbage", "not json", "list json", "no weights", "no tokenizer", "misfit", "bad tokenizer")
    for name in wrong:
        shutil.copytree(root / "model", root / name)
    weights = (root / "model" / "model.safetensors").read_bytes()
    (root / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "garbage" / "model.safetensors").write_bytes(b"not a model at all" * 10)
    (root / "not json" / "config.json").write_text("{hidden_size: 3")
    (root / "list json" / "config.json").write_text("[1, 2]")
    (root / "no weights" / "model.safetensors").unlink()
    (root / "no tokenizer" / "tokenizer.json").unlink()
    (root / "bad tokenizer" / "tokenizer.json").write_text("{}")
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "misfit" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    other = {"name": "other", "bits_per_byte": 2.0, "trained": {"tokens": 1}, "text_sha256": "0"}
    (root / "result.json").write_text(json.dumps(other))
    return root


# what is wrong, the arguments (paths are of the place), a part of the sentence
WRONG = [
    ("data missing", "train missing.txt", "no file or folder 'missing.txt'"),
    ("pattern matches nothing", "train *.nothing", "no file matches"),
    ("data empty", "train empty.txt", "is empty"),
    ("data blank", "train blank.txt", "is empty"),
    ("data binary", "train binary.bin", "is not UTF-8 text"),
    ("folder without text", "train no_text", "has no text file"),
    ("folder empty", "train empty_folder", "has no text file"),
    ("corpus shorter than a context", "train short.txt --tokenizer bytes", "fewer than one context of 256"),
    ("corpus of one word", "train word.txt", "too short"),
    ("learning rate nan", "train corpus --lr nan", "learning rate must be a positive number, not nan"),
    ("learning rate negative", "train corpus --lr -1", "learning rate"),
    ("learning rate infinite", "train corpus --lr inf", "learning rate"),
    ("learning rate a word", "train corpus --lr fast", "--lr"),
    ("size unknown", "train corpus --size huge", "unknown size 'huge'"),
    ("tokenizer unknown", "train corpus --tokenizer words", "unknown tokenizer 'words'"),
    ("vocabulary too small", "train corpus --vocab-size 10", "at least 258"),
    ("context zero", "train corpus --context 0", "context must be at least 1"),
    ("batch zero", "train corpus --batch-size 0", "batch_size must be at least 1"),
    ("accumulate zero", "train corpus --accumulate 0", "accumulate must be at least 1"),
    ("steps zero", "train corpus --steps 0", "steps must be at least 1"),
    ("minutes zero", "train corpus --minutes 0", "minutes must be positive"),
    ("minutes nan", "train corpus --minutes nan", "minutes must be positive"),
    ("clip zero", "train corpus --clip 0", "clip must be a positive number"),
    ("warm-up negative", "train corpus --warmup -1", "warmup must be"),
    ("weight decay nan", "train corpus --weight-decay nan", "weight_decay must be"),
    ("seed negative", "train corpus --seed -1", "seed must be"),
    ("device unknown", "train corpus --device toaster", "unknown device 'toaster'"),
    ("dtype unknown", "train corpus --dtype int8", "dtype must be"),
    ("attention unknown", "train corpus --attention window", "unknown attention 'window'"),
    ("option of the model unknown", "train corpus --set decai=token", "did you mean 'decay'?"),
    ("option of the model like no other", "train corpus --set xyzzy=1", "the fields of hla.HLAConfig"),
    ("option of the model without a value", "train corpus --set decay", "NAME=VALUE"),
    ("option of the model with a wrong value", "train corpus --set op=hla9", "cannot be built"),
    ("option of the model of another kind", "train corpus --set num_hidden_layers=2.5", "must be an integer, got 2.5"),
    ("option of the model that cannot be saved", "train corpus --set head_dim=7", "head_dim must be even"),
    ("output holds something else", "train corpus --out in_use", "holds other files"),
    ("output holds a run", "train corpus --out model", "add --overwrite"),
    ("output is a file", "train corpus --out word.txt", "is a file"),
    ("output below a file", "train corpus --out word.txt/run", "cannot write"),
    ("model missing", "generate missing hello", "no model folder"),
    ("model is a file", "generate word.txt hello", "no model folder"),
    ("model folder is none", "generate corpus hello", "is not a model folder"),
    ("weights missing", "generate no_weights hello", "has no model.safetensors"),
    ("tokenizer missing", "generate no_tokenizer hello", "has no tokenizer.json"),
    ("tokenizer damaged", "generate bad_tokenizer hello", "cannot load the tokenizer"),
    ("weights truncated", "generate truncated hello", "is damaged"),
    ("weights garbage", "generate garbage hello", "is damaged"),
    ("weights of another shape", "generate misfit hello", "do not fit"),
    ("config not JSON", "generate not_json hello", "it is not JSON"),
    ("config not an object", "generate list_json hello", "does not hold a JSON object"),
    ("prompt empty", ["generate", "model", ""], "the prompt is empty"),
    ("prompt file missing", "generate model --file missing.txt", "cannot read the prompt file"),
    ("prompt file empty", "generate model --file empty.txt", "the prompt is empty"),
    ("prompt file binary", "generate model --file binary.bin", "is not UTF-8 text"),
    ("prompt twice", "generate model hello --file word.txt", "not both"),
    ("nothing on standard input", "generate model", "the prompt is empty"),
    ("temperature negative", "generate model hello --temperature -1", "temperature"),
    ("top-p too large", "generate model hello --top-p 1.5", "top_p"),
    ("top-k zero", "generate model hello --top-k 0", "top_k"),
    ("no tokens", "generate model hello --max-tokens 0", "max_tokens"),
    ("stop string empty", ["generate", "model", "hello", "--stop", ""], "stop string is empty"),
    ("text to evaluate missing", "evaluate model missing.txt", "no file or folder"),
    ("context to evaluate zero", "evaluate model --context 0", "context must be at least 1"),
    ("reference missing", "evaluate model --reference missing.json", "cannot read the reference"),
    ("reference of another kind", "evaluate model --reference model/config.json", "is not a result"),
    ("reference on other text", "evaluate model --reference result.json", "other text"),
    ("command unknown", "sing", "No such command 'sing'"),
    ("option unknown", "train --learning-rate 1", "No such option"),
]


@pytest.mark.parametrize("arguments, sentence", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_input_ends_in_one_clear_sentence(arguments, sentence, place, monkeypatch):
    monkeypatch.chdir(place)
    if isinstance(arguments, str):
        arguments = [a.replace("_", " ") if a.count("_") and (place / a.replace("_", " ")).exists() else a
                     for a in arguments.split()]  # fmt: skip
    if arguments[0] == "train" and "--out" not in arguments:
        arguments = [*arguments, "--out", "new"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)  # not an error that got through
    told = " ".join(result.stderr.replace("│", " ").split())
    assert sentence in told and "Traceback" not in told
    if result.exit_code == 1:
        assert result.stderr.startswith("hla: ") and result.stderr.count("\n") == 1
    assert not (place / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["train", "generate model hello", "evaluate model"])
def test_cuda_where_there_is_none(command, place, monkeypatch):
    monkeypatch.chdir(place)
    result = RUNNER.invoke(app, [*command.split(), "--device", "cuda"])
    assert result.exit_code == 1 and "needs a CUDA GPU" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written(place, tmp_path):
    tmp_path.chmod(0o500)
    result = RUNNER.invoke(app, ["train", str(place / "corpus"), "--out", str(tmp_path / "run"), *SMALL])
    assert result.exit_code == 1 and "cannot write" in result.stderr


def hla(*arguments: str, cwd: Path, stdin: bytes = b"", **limits: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "hla.cli", *arguments]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=environment, **limits)  # type: ignore[call-overload]


@pytest.mark.parametrize("arguments, command", [("train --stepz 3", "hla train"), ("sing", "hla")])
def test_a_usage_error_says_where_help_is(arguments, command, tmp_path):
    done = hla(*arguments.split(), cwd=tmp_path)
    told = done.stderr.decode()
    assert done.returncode == 2 and told.startswith("hla: No such") and told.endswith(f"(see {command} --help)\n")


def limit_files() -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize(
    "arguments, sentence, status",
    [
        (["train", "corpus", "--out", "full", *SMALL], "cannot save the checkpoint 'full/checkpoints/step-", 1),
        (["train", "corpus", "--lr", "abc"], "Invalid value for '--lr'", 2),
        (["generate", "truncated", "hello"], "is damaged", 1),
    ],
    ids=["disk full", "usage", "damaged weights"],
)
def test_the_real_command_never_shows_a_traceback(arguments, sentence, status, place):
    """A limit on the size of files stands in for a full disk."""
    done = hla(*arguments, cwd=place, preexec_fn=limit_files)
    shown = done.stderr.decode()
    assert done.returncode == status and "Traceback" not in shown and "Exception" not in shown
    assert shown.splitlines()[-1].startswith("hla: ") and sentence in shown.splitlines()[-1]


def test_train_generate_and_evaluate_work_together(place, monkeypatch):
    monkeypatch.chdir(place)
    trained = hla(
        "train", "-", "--out", "run", *SMALL, cwd=place, stdin=(place / "corpus" / "doc1.txt").read_bytes() * 3
    )
    assert trained.returncode == 0 and b"The model is in 'run'" in trained.stderr
    again = RUNNER.invoke(app, ["evaluate", "run"])
    assert again.exit_code == 1 and "standard input" in again.stderr

    (place / "prompt.txt").write_text("ba co\n")
    options = ["--seed", "1", "--max-tokens", "20"]
    by_argument = RUNNER.invoke(app, ["generate", "run", "ba co", *options])
    by_file = RUNNER.invoke(app, ["generate", "run", "--file", "prompt.txt", *options])
    by_input = RUNNER.invoke(app, ["generate", "run", *options], input="ba co\n")
    assert by_argument.exit_code == 0 and by_argument.stdout.startswith("ba co")
    assert by_argument.stdout == by_file.stdout == by_input.stdout and len(by_argument.stdout) > 10
    assert "tokens/s" in by_argument.stderr
    cut = by_argument.stdout[8]
    stopped = RUNNER.invoke(app, ["generate", "run", "ba co", *options, "--stop", cut])
    assert stopped.stdout == by_argument.stdout[: by_argument.stdout.index(cut, 5)] + "\n"


def test_evaluate_finds_the_held_out_text_and_compares(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(place / "model")
    first = RUNNER.invoke(app, ["evaluate", model, "--json", "result.json"])
    assert first.exit_code == 0, first.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    training = json.loads((place / "model" / "training.json").read_text())
    assert result["bits_per_byte"] == pytest.approx(training["evaluation"]["bits_per_byte"], rel=1e-6)
    assert result["text_sha256"] == training["held_out"]["sha256"]

    other = {**result, "name": "the other", "bits_per_byte": 1.25, "trained": {"tokens": 98765}}
    (tmp_path / "reference.json").write_text(json.dumps(other))
    shown = RUNNER.invoke(app, ["evaluate", model, "--reference", "reference.json"]).stdout
    rows = [line for line in shown.splitlines() if any(name in line for name in ("hla", "the other", "gzip", "xz"))]
    assert [name in row for name, row in zip(("hla", "the other", "gzip -9", "xz -9"), rows, strict=True)] == [True] * 4
    assert "1.250" in rows[1] and "98,765 tokens" in rows[1]
    assert f"{training['tokens']:,} tokens" in rows[0] and f"{result['bits_per_byte']:.3f}" in rows[0]

    document = str(place / "corpus" / "doc0.txt")
    named = RUNNER.invoke(app, ["evaluate", model, document, "--json", "named.json"])
    assert named.exit_code == 0 and json.loads((tmp_path / "named.json").read_text())["bytes"] == os.path.getsize(
        document
    )


def test_held_out_text_that_has_changed_is_noticed(place, tmp_path):
    data = write_corpus(tmp_path / "corpus")
    train(micro_config(data, tmp_path / "model", steps=1))
    for file in data.iterdir():
        file.write_text(file.read_text() + " more")
    result = RUNNER.invoke(app, ["evaluate", str(tmp_path / "model")])
    assert result.exit_code == 1 and "has changed" in result.stderr


def test_compressors_are_the_command_line_tools(place):
    texts = read_documents([str(place / "corpus")])
    data = b"".join(d.text.encode() for d in texts)
    result = compressors(texts)
    for name, tool in (("gzip -9", ["gzip", "-9", "-n"]), ("xz -9", ["xz", "-9"])):
        if shutil.which(tool[0]):
            packed = subprocess.run([*tool, "-c"], input=data, capture_output=True, check=True).stdout
            assert result[name] == pytest.approx(8 * len(packed) / len(data), rel=0.01)
        assert 0 < result[name] < 8


def test_every_option_of_train_has_its_place_in_the_help():
    """A table per purpose; an option without one would open a sixth table with --help."""
    command = typer.main.get_command(app).commands["train"]
    panels = {option.name: option.rich_help_panel for option in command.params if isinstance(option, TyperOption)}
    assert set(panels.values()) == {"Model", "Data", "Optimisation", "Run", "Scale"}, panels
    shown = RUNNER.invoke(app, ["train", "--help"]).stdout
    assert all(f" {panel} " in shown for panel in panels.values())


def test_help_names_the_commands():
    shown = RUNNER.invoke(app, ["--help"])
    assert shown.exit_code == 0 and all(name in shown.stdout for name in ("train", "evaluate", "generate", "inspect"))
