"""Runs that are stopped, killed, damaged or out of disk, and go on."""

import json
import os
import pickletools
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hla.train
from hla.checkpoint import load_model
from hla.cli import app
from hla.errors import HLAError
from hla.train import train
from hla.training_state import checkpoints, newest, read_state, save_checkpoint
from tests.text_helpers import micro_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), count=6, words=60)


def losses(folder: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss", r.get("val_loss"))) for r in records if "loss" in r or "val_loss" in r]


def stop_after(monkeypatch, step: int) -> None:
    """Let the process raise Ctrl-C against itself when this step is done."""
    real = hla.train._Run.one_step

    def one_step(self, progress):
        record = real(self, progress)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return record

    monkeypatch.setattr(hla.train._Run, "one_step", one_step)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """A run of eight steps that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(micro_config(corpus, out, steps=8, save_every=3, eval_every=2, keep=2, lr=1e-2))
    return out


# ------------------------------------------------------------------------------------------------------ going on


def test_runs_killed_at_random_moments_and_in_every_phase_of_a_save_end_as_if_nobody_had():
    """The first calls of os.fsync, os.rename and so on are those of the first checkpoint and of the model beside it."""
    options = "--moments 5 --calls 0 3 7 8 18 20 21"
    command = [sys.executable, "-m", "tests.killed_runs", *options.split()]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == 12 and seen["while_writing"] >= 2


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(whole, corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    settings = {"steps": 8, "save_every": 3, "eval_every": 2, "keep": 2, "lr": 1e-2}
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        stopped = train(micro_config(corpus, out, **settings))
    assert stopped.stopped_by == signal.SIGINT and stopped.steps == 5
    assert [p.name for p in checkpoints(out)] == ["step-00000003", "step-00000005"]
    torch.manual_seed(99)  # a process of its own would have another random state, too
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out)])
    assert result.exit_code == 0 and "Going on from step 5" in result.stderr
    assert losses(out) == losses(whole)
    models = [load_model(folder)[0].state_dict() for folder in (out, whole)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    assert [p.name for p in checkpoints(out)] == ["step-00000006", "step-00000008"]
    over = CliRunner().invoke(app, ["train", "--resume", "--out", str(out)])
    assert over.exit_code == 0 and "All 8 steps are done: only a larger --steps" in over.stderr
    assert losses(out) == losses(whole)
    assert read_state(checkpoints(out)[-1])["tokens"] == load_model(whole)[2]["tokens"]


def test_a_checkpoint_has_everything_and_no_pickle(whole):
    state = read_state(checkpoints(whole)[-1])
    assert state["step"] == 8 and state["config"]["lr"] == 1e-2 and len(state["data_sha256"]) == 64
    for file in checkpoints(whole)[-1].iterdir():
        assert file.suffix in (".json", ".safetensors")
        with pytest.raises(ValueError, match="unknown|exhausted|no newline|opcode"):
            list(pickletools.genops(file.read_bytes()))


def test_the_random_state_goes_on(corpus, tmp_path, monkeypatch):
    """A model that draws numbers (here: noise on the gradient) must draw the same ones."""
    real = hla.train.train_step

    def noisy(model, optimizer, batches, **options):
        handle = model.lm_head.register_full_backward_hook(lambda m, i, o: (i[0] + 1e-3 * torch.randn(i[0].shape),))
        try:
            return real(model, optimizer, batches, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(hla.train, "train_step", noisy)
    settings = {"steps": 6, "save_every": 2}
    train(micro_config(corpus, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(micro_config(corpus, tmp_path / "run", **settings))
    torch.manual_seed(99)
    train(micro_config(corpus, tmp_path / "run", resume=True, **settings))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_finished_run_goes_on_with_more_steps(whole, corpus, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    settings = {"save_every": 3, "eval_every": 2, "lr": 1e-2, "resume": True}
    assert train(micro_config(corpus, out, steps=8, **settings)).steps == 8  # nothing is left to do
    assert losses(out) == losses(whole)
    assert train(micro_config(corpus, out, steps=10, **settings)).steps == 10
    assert [step for step, _ in losses(out)][-2:] == [10, 10]


def test_what_makes_another_run_is_refused(whole, corpus, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(HLAError, match="has batch_size = 2, not 3"):
        train(micro_config(corpus, out, steps=9, batch_size=3, resume=True))
    data = shutil.copytree(corpus, tmp_path / "corpus")
    moved = micro_config(data, tmp_path / "other", steps=1)
    train(moved)
    for file in data.iterdir():
        file.write_text(file.read_text() + " and more")
    with pytest.raises(HLAError, match="training data has changed"):
        train(micro_config(data, tmp_path / "other", steps=2, resume=True))
    (tmp_path / "in use").mkdir()
    (tmp_path / "in use" / "thesis.txt").write_text("precious")
    with pytest.raises(HLAError, match="other files"):
        train(micro_config(corpus, tmp_path / "in use", resume=True))
    (out / "train.toml").unlink()
    with pytest.raises(HLAError, match="has no train.toml"):
        train(micro_config(corpus, out, steps=9, resume=True))


# ------------------------------------------------------------------------------------------------------ damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: flip(next(p.glob("*.safetensors"))),
        lambda p: flip(p / "state.json"),
        lambda p: next(p.glob("*.safetensors")).unlink(),
        lambda p: os.truncate(next(p.glob("*.safetensors")), 1000),
        lambda p: (p / "manifest.json").unlink(),
        lambda p: (p / "manifest.json").write_text("{}"),
        lambda p: shutil.copy(next(p.glob("*.safetensors")), p / "shard-00002.safetensors"),
    ],
    ids=["bit", "bit of the state", "file missing", "cut", "no manifest", "manifest empty", "file too many"],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(damage, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before, last = checkpoints(out)
    damage(last)
    warnings: list[str] = []
    path, state = newest(out, warnings.append)
    assert path == before and state["step"] == 6 and len(warnings) == 1 and "damaged" in warnings[0]
    flip(before / "state.json")
    with pytest.raises(HLAError, match="all 2 checkpoints .* are damaged"):
        newest(out, warnings.append)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, corpus, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    flip(next(checkpoints(out)[-1].glob("*.safetensors")))
    train(micro_config(corpus, out, steps=8, save_every=3, eval_every=2, lr=1e-2, resume=True))
    assert losses(out) == losses(whole)
    assert read_state(checkpoints(out)[-1])["step"] == 8  # the damaged one was replaced


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    small, large = {"x": torch.arange(4.0)}, {"x": torch.zeros(20_000)}
    save_checkpoint(tmp_path, 1, small, {}, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(HLAError, match=r"cannot save the checkpoint .*step-00000002': File too large"):
            save_checkpoint(tmp_path, 2, large, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert read_state(checkpoints(tmp_path)[-1])["step"] == 1
    save_checkpoint(tmp_path, 3, large, {}, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
