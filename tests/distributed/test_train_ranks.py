"""``hla train`` on several processes makes the run that one process makes, and goes on with any number of them."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from typer.testing import CliRunner

import hla.train
from hla.build import build_model, build_optimizer
from hla.checkpoint import load_model
from hla.cli import app
from hla.data import encode_documents, token_bytes
from hla.devices import rank_device
from hla.distributed import parallelize_hla
from hla.distributed.training import Spread
from hla.distributed.world import Ranks, tells, told_by
from hla.errors import HLAError
from hla.evaluate import evaluate
from hla.sources import prepare
from hla.train import TrainResult, train
from hla.train_config import TrainConfig, config_text
from hla.training_state import checkpoints, read_state, restore, run_tensors, save_checkpoint
from tests.distributed.ranks import ROOT, TIMEOUT
from tests.text_helpers import micro_config, write_corpus

MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
STEPS = 20
# Sums over parts round otherwise than sums over the whole: by some 2^-24 of the loss. Adam divides by the size of the
# gradient, so parameters with hardly any gradient move by rounding alone, and that grows from step to step. Seen: 2e-7.
FIRST, LAST = 5e-7, 2e-6
MODEL = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), count=6, words=58)


def config(corpus: Path, out: Path, mesh: tuple[int, int, int] = (1, 1, 1), **settings) -> TrainConfig:
    """Twenty steps of two micro-batches of four rows, which are several epochs that do not divide by four."""
    dp, sp, tp = mesh
    defaults = {
        "model": MODEL, "batch_size": 4, "accumulate": 2, "steps": STEPS, "eval_every": 8, "save_every": 6,
        "telemetry_every": 10, "dp": dp, "sp": sp, "tp": tp,
    }  # fmt: skip
    return micro_config(corpus, out, **{**defaults, **settings})


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    """By step, of which none was logged twice."""
    found = [(r["step"], r["loss"]) for r in records(out) if "loss" in r]
    assert len(dict(found)) == len(found)
    return dict(found)


def timeless(out: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records(out)]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, put together from the files of all ranks."""
    parts: dict[str, list] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            places = json.loads(f.metadata()["DCP_SHARDING_INFO"])
            for name in f.keys():  # noqa: SIM118
                parts.setdefault(name, []).append((places[name]["saved_offsets"], f.get_tensor(name)))
    for found in parts.values():
        found.sort(key=lambda part: part[0])
    return {name: torch.cat([x for _, x in p]) if p[0][1].dim() else p[0][1] for name, p in parts.items()}


def close(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        bound = FIRST if step == 1 else LAST
        assert abs(found[step] - loss) < bound * loss, (step, found[step], loss)


def same_records(out: Path, whole: Path) -> None:
    """But for the time, and rounding."""
    mine, theirs = records(out), records(whole)
    assert [(r["step"], set(r)) for r in mine] == [(r["step"], set(r)) for r in theirs]
    for record, expected in zip(mine, theirs, strict=True):
        for name, value in expected.items():
            if name not in ("seconds", "tokens_per_second"):
                assert record[name] == pytest.approx(value, rel=1e-4), (record["step"], name)


def run_train(groups, rank, settings: TrainConfig) -> None:
    train(settings, Console(quiet=True))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    settings = config(corpus, out)
    rows = len(prepare(settings).train) // settings.context
    assert rows % 4 == 1 and rows < STEPS * 8  # so that some micro-batch has one row, for up to four replicas
    train(settings, Console(quiet=True))
    return out


# ------------------------------------------------------------------------------------------------------ one run


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_makes_the_run_of_one_process(mesh, whole, corpus, pool, tmp_path):
    out = tmp_path / "run"
    pool(mesh[0] * mesh[1] * mesh[2]).run(run_train, config(corpus, out, mesh))
    close(losses(out), losses(whole))
    same_records(out, whole)
    state, other = (read_state(checkpoints(folder)[-1]) for folder in (out, whole))
    assert [p.name for p in checkpoints(out)] == [p.name for p in checkpoints(whole)]
    assert {k: state[k] for k in ("step", "tokens", "logged")} == {k: other[k] for k in ("step", "tokens", "logged")}
    # The export is what the ranks had: of the tensors, and of what they scored with them.
    saved = tensors(checkpoints(out)[-1])
    model, tokenizer, training = load_model(out)
    for name, x in model.named_parameters():
        assert torch.equal(x, saved[f"model.{name}"]), name
    held_out = encode_documents(tokenizer, prepare(config(corpus, out)).held_documents)
    score = evaluate(model, held_out, [len(b) for b in token_bytes(tokenizer)], context=32)
    last = records(out)[-1]
    assert score.loss == pytest.approx(last["val_loss"], rel=1e-6) and score.tokens == last["val_tokens"]
    assert training["parameters"] == sum(x.numel() for x in model.parameters())
    assert (out / "train.toml").read_text() == (whole / "train.toml").read_text().replace(str(whole), str(out))


@pytest.mark.parametrize("mesh", [(2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1)], ids=str)
def test_replicas_make_the_run_of_one_process(mesh, whole, corpus, pool, tmp_path):
    """Also where a micro-batch has no row for some of them, and with recomputation."""
    out, ranks = tmp_path / "run", mesh[0] * mesh[1]
    pool(ranks).run(run_train, config(corpus, out, mesh, shard=False, recompute=ranks == 4))
    close(losses(out), losses(whole))
    same_records(out, whole)
    saved, expected = (tensors(checkpoints(folder)[-1]) for folder in (out, whole))
    assert {n: (x.shape, x.dtype) for n, x in saved.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}
    assert len(list(checkpoints(out)[-1].glob("*.safetensors"))) == ranks  # each writes some of them
    model, *_ = load_model(out)
    for name, x in model.named_parameters():
        assert torch.equal(x, saved[f"model.{name}"]), name


def test_replicas_go_on_as_shards_and_the_other_way_round(whole, corpus, pool, tmp_path):
    out = tmp_path / "run"
    pool(4).run(run_until, config(corpus, out, (4, 1, 1), shard=False), 5, signal.SIGINT, 3)
    pool(2).run(run_until, config(corpus, out, (2, 1, 1), resume=True), 9, signal.SIGTERM, 1)
    pool(2).run(run_until, config(corpus, out, (1, 2, 1), shard=False, resume=True), 13, signal.SIGINT, 0)
    train(config(corpus, out, resume=True), Console(quiet=True))
    close(losses(out), losses(whole))


def test_who_shares_out_a_model():
    shares = lambda mesh, device, parameters, **more: TrainConfig(**more).shares(mesh, device, parameters, 80 << 30)  # noqa: E731
    assert shares((2, 1, 1), "cpu", 10**6)
    assert not shares((2, 1, 1), "cuda", 10**9)
    assert shares((2, 1, 1), "cuda", 2 * 10**9)
    assert not shares((2, 2, 1), "cuda", 10**6) and shares((2, 1, 2), "cuda", 10**6)
    assert shares((2, 1, 1), "cuda", 10**6, compile=True) and not shares((2, 1, 1), "cuda", 10**6, cuda_graphs=False)
    assert not shares((2, 1, 1), "cuda", 2 * 10**9, cuda_graphs=True)  # which is asked for
    assert shares((2, 1, 1), "cuda", 10**6, shard=True) and not shares((2, 1, 1), "cpu", 10**9, shard=False)


def check_options(groups, rank, corpus: Path, folder: Path) -> None:
    real, asked = parallelize_hla, []

    def recording(model, mesh, **options):
        asked.append(options)
        return real(model, mesh, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hla.distributed.training.parallelize_hla", recording)
        for name, settings in {"recompute": {"recompute": True}, "mixed": {"dtype": "bfloat16"}}.items():
            train(config(corpus, folder / name, (1, 2, 2), steps=4, **settings), Console(quiet=True))
    assert [options["activation_checkpointing"] for options in asked] == [True, False]
    assert [options["reduce_dtype"] for options in asked] == [None, torch.float32]
    with pytest.MonkeyPatch.context() as patch:  # clocks that do not agree
        patch.setattr(hla.train, "time", SimpleNamespace(monotonic=lambda: time.monotonic() * (1 + rank)))
        minutes = config(corpus, folder / "minutes", (2, 2, 1), steps=None, minutes=0.02)
        steps = train(minutes, Console(quiet=True)).steps
    assert steps > 0 and set(Ranks().gather(steps)) == {steps}


def test_options(whole, corpus, pool, tmp_path):
    """Settings that change how a step is computed, and an end by the clock, which is that of the first rank."""
    pool().run(check_options, corpus, tmp_path)
    first = losses(whole)[1]
    assert losses(tmp_path / "recompute")[1] == pytest.approx(first, rel=FIRST)
    mixed = losses(tmp_path / "mixed")[1]
    assert mixed != pytest.approx(first, rel=FIRST) and mixed == pytest.approx(first, rel=0.01)


# ------------------------------------------------------------------------------------------------------ going on


def stop_after(step: int, number: int, times: int = 1) -> Callable:
    """A step for runs in which this process gets a signal when this one is done, perhaps more than once."""
    real = hla.train._Run.one_step

    def one_step(self, progress):
        record = real(self, progress)
        for _ in range(times if self.step == step else 0):
            os.kill(os.getpid(), number)
        return record

    return one_step


def run_until(groups, rank, settings: TrainConfig, step: int, number: int, where: int) -> None:
    """Train until one rank alone gets a signal (as from torchrun, again): all must stop after the same step."""
    real, handlers = hla.train._Run.one_step, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    assert all(handler in (signal.SIG_DFL, signal.default_int_handler) for handler in handlers.values())
    torch.manual_seed(99 + rank)  # a process of its own would have another random state, too
    try:
        if rank == where:
            hla.train._Run.one_step = stop_after(step, number, times=2)
        result = train(settings, Console(quiet=True))
        assert (result.steps, result.stopped_by) == (step, number)
    finally:
        hla.train._Run.one_step = real
        for n, handler in handlers.items():
            signal.signal(n, handler)


def test_a_run_goes_on_with_fewer_processes_and_with_more(whole, corpus, pool, tmp_path):
    out = tmp_path / "run"
    pool(4).run(run_until, config(corpus, out, (1, 2, 2)), 5, signal.SIGINT, 3)
    pool(2).run(run_until, config(corpus, out, (2, 1, 1), resume=True), 9, signal.SIGTERM, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hla.train._Run, "one_step", stop_after(13, signal.SIGINT))
        assert train(config(corpus, out, resume=True), Console(quiet=True)).steps == 13
    pool(4).run(run_train, config(corpus, out, (2, 1, 2), resume=True))
    close(losses(out), losses(whole))
    assert [p.name for p in checkpoints(out)] == ["step-00000018", "step-00000020"]
    found, expected = (tensors(checkpoints(folder)[-1]) for folder in (out, whole))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape and found[name].dtype == x.dtype, name
    assert torch.equal(found["random.cpu"], expected["random.cpu"])


def save_again(groups, rank, source: Path, settings: TrainConfig, folder: Path, step: int) -> None:
    """Restore a checkpoint and save what it became."""
    world = Ranks()
    model = build_model(settings, prepare(settings).tokenizer)
    mesh = settings.mesh(world.size)
    resharding = Spread(model, mesh, world, torch.device("cpu"), torch.float32, settings).resharding
    optimizer = build_optimizer(model, settings.lr, settings.weight_decay)
    restore(source, model, optimizer, resharding)
    save_checkpoint(folder, step, resharding.dealt(run_tensors(model, optimizer)), {}, 9, world)


def test_a_checkpoint_goes_through_any_mesh_without_changing_a_bit(whole, corpus, pool, tmp_path):
    """Weights, moments, counters and random state, from one process through four meshes, each loading from the last."""
    source = checkpoints(whole)[-1]
    expected = tensors(source)
    assert sum(name.startswith("optimizer.") for name in expected) == 3 * sum(n.startswith("model.") for n in expected)
    for step, mesh in enumerate([(1, 2, 2), (1, 1, 4), (2, 1, 1), (4, 1, 1)], 1):
        ranks = mesh[0] * mesh[1] * mesh[2]
        pool(ranks).run(save_again, source, config(corpus, tmp_path, mesh), tmp_path, step)
        source = checkpoints(tmp_path)[-1]
        assert read_state(source)["step"] == step and len(list(source.glob("*.safetensors"))) == ranks
        found = tensors(source)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_stopped_run_goes_on_to_the_bit_on_the_same_mesh(corpus, pool, tmp_path):
    settings = {"steps": 7, "save_every": 4}
    pool(4).run(run_train, config(corpus, tmp_path / "whole", (1, 2, 2), **settings))
    out = tmp_path / "run"
    pool(4).run(run_until, config(corpus, out, (1, 2, 2), **settings), 5, signal.SIGINT, 0)
    newest = checkpoints(out)[-1]
    damaged = next(newest.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")  # so that the one before is used, of step 4
    pool(4).run(run_train, config(corpus, out, (1, 2, 2), resume=True, **settings))
    assert timeless(out) == timeless(tmp_path / "whole")
    found, expected = (tensors(checkpoints(folder)[-1]) for folder in (out, tmp_path / "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


# ------------------------------------------------------------------------------------------------------ errors


def check_skipping(groups, rank, settings: TrainConfig) -> None:
    """One rank finds a loss that is no number in one micro-batch of the fifth step, and later gradients in all."""
    real, calls = Spread.nats, []

    def nats(self, inputs, targets):
        calls.append(None)
        found = real(self, inputs, targets)
        if rank != 2:
            return found
        return found + torch.nan if len(calls) == 9 else found * torch.nan if len(calls) > 12 else found

    Spread.nats = nats
    try:
        with pytest.raises(HLAError, match="at step 9 the loss is nan .* were skipped for that: 3; .* is in ") as error:
            train(settings, Console(quiet=True))
        assert told_by(error.value) == "RANK"
    finally:
        Spread.nats = real


def test_a_step_is_skipped_by_all_ranks_or_by_none(corpus, pool, tmp_path, monkeypatch):
    """They go on like one process that skipped the same steps."""
    out, settings = tmp_path / "run", {"max_skipped": 3, "save_every": 6, "eval_every": 99}
    pool().run(check_skipping, config(corpus, out, (2, 1, 2), **settings))
    assert [(r["step"], r["skipped"]) for r in records(out) if "skipped" in r] == [(5, 1), (7, 2), (8, 3), (9, 4)]
    assert [p.name for p in checkpoints(out)] == ["step-00000006"]
    assert all(x.isfinite().all() for x in tensors(checkpoints(out)[-1]).values())

    real, steps = hla.train.train_step, iter(range(1, STEPS))
    monkeypatch.setattr(
        hla.train, "train_step", lambda *a, **k: (torch.nan,) * 2 if next(steps) in (5, 7, 8, 9) else real(*a, **k)
    )
    with pytest.raises(HLAError, match="so many steps in a row"):
        train(config(corpus, tmp_path / "one", **settings), Console(quiet=True))
    close(losses(out), losses(tmp_path / "one"))


def check_full_disk(groups, rank, folder: Path) -> None:
    """A limit on the size of files, on one rank, stands in for a full disk."""
    world, before = Ranks(), resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = init_device_mesh("cpu", (world.size,))

    def save(step: int, count: int) -> None:
        x = DTensor.from_local(torch.full((count,), float(step)), rows, [Shard(0)])
        save_checkpoint(folder, step, {"x": x}, {}, keep=1, world=world)

    save(1, 4)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(HLAError, match="cannot save the checkpoint .*step-00000002': File too large") as error:
            save(2, 20_000)
        assert told_by(error.value) == "RANK"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    if rank == 0:
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000001"]
        assert read_state(checkpoints(folder)[-1])["step"] == 1
    dist.barrier()
    save(3, 20_000)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_full_disk_on_one_rank_keeps_the_previous_checkpoint(pool, tmp_path):
    pool(2).run(check_full_disk, tmp_path)


def check_errors(groups, rank, folder: Path) -> None:
    """What one rank alone finds wrong is an error of all, with its name; what the first one does, with its words."""
    world = Ranks()

    def work() -> None:
        if rank == 3:
            raise HLAError("no such file")

    with pytest.raises(HLAError, match="^no such file$" if rank == 3 else "^rank 3: no such file$"):
        world.together(work)
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*missing'"):
        world.first(lambda: (folder / "missing").read_text())
    assert world.first(lambda: rank) == 0 and world.same(rank + 0.1) == 0.1 and world.highest(rank) == 3
    assert world.gather(rank) == [0, 1, 2, 3]


def test_errors_are_those_of_all_ranks(pool, tmp_path):
    pool().run(check_errors, tmp_path)


WRONG = [
    ({"dp": 2, "tp": 3}, 4, "dp 2 x sp 1 x tp 3 = 6 processes, but torchrun has started 4"),
    ({"sp": 4}, 6, "dp 1 x sp 4 x tp 1 = 4 processes, but torchrun has started 6"),
    ({"dp": 2}, 1, "= 2 processes, but there is one: start it with torchrun --nproc-per-node 2"),
    ({"dp": 4, "batch_size": 6}, 4, "batch_size must be divisible by dp: 6 rows for 4 ranks"),
    ({"sp": 3, "context": 32}, 3, "context must be divisible by sp: 32 tokens for 3 ranks"),
    ({"data": ("-",)}, 2, "standard input cannot be read by several processes"),
    ({"tp": 2, "shard": False}, 2, "with --no-shard every rank has the whole model: that goes with dp and sp"),
    ({"compile": True, "shard": False}, 2, "that goes with dp and sp, and without --compile"),
]


@pytest.mark.parametrize("settings, ranks, sentence", WRONG, ids=[w[2][:40] for w in WRONG])
def test_a_mesh_that_does_not_fit_is_refused(settings, ranks, sentence, monkeypatch):
    with pytest.raises(HLAError) as error:
        TrainConfig(**settings).mesh(ranks)
    assert sentence in str(error.value)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))  # before anything else is done, so nothing waits for others
    with pytest.raises(HLAError) as error:
        train(TrainConfig(**settings))
    assert sentence in str(error.value)
    assert [tells(error.value) for local in "01" if monkeypatch.setenv("LOCAL_RANK", local) is None] == [True, False]


def test_the_mesh_is_what_is_left_for_dp():
    assert TrainConfig().mesh(1) == (1, 1, 1) and TrainConfig(tp=2).mesh(8) == (4, 1, 2)
    for name in ("dp", "sp", "tp"):
        with pytest.raises(HLAError, match=f"{name} must be at least 1, not 0"):
            TrainConfig(**{name: 0})


def test_every_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(rank_device("auto", 2)) == str(rank_device("cuda", 2)) == "cuda:1"
    assert str(rank_device("cuda:0", 1)) == "cuda:0" and str(rank_device("cpu", 2)) == "cpu"
    with pytest.raises(HLAError, match="'cuda:0' is one for all: use --device cuda"):
        rank_device("cuda:0", 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(HLAError, match="there is no device 'cuda:2': this machine has 2 GPUs"):
        rank_device("auto", 4)


def test_a_restart_does_not_overwrite(monkeypatch, corpus, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(HLAError, match="restarted a run with --overwrite, which would delete it: use --resume"):
        train(config(corpus, tmp_path / "run", overwrite=True))


# ------------------------------------------------------------------------------------------------------ under torchrun


def test_the_commands_of_the_page_are_understood(monkeypatch, tmp_path):
    asked = []

    def train(settings: TrainConfig, console: Console):
        asked.append(settings)
        return TrainResult(Path(settings.out), 0, 0, 0.0, None, None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hla.train, "train", train)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    torchrun --nproc-per-node (\d) (?:--max-restarts 3 )?-m hla.cli (.*)$", page, re.M)
    assert len(commands) == 3
    for _, command in commands:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
    meshes = [settings.mesh(int(ranks)) for (ranks, _), settings in zip(commands, asked, strict=True)]
    assert meshes == [(2, 1, 2), (1, 2, 1), (4, 1, 1)] and all(settings.resume for settings in asked)


def start(ranks: int, *arguments: str | Path, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    # A session of its own, so that Ctrl-C can be sent to all processes as a terminal sends it.
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def settings_file(settings: TrainConfig, folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(config_text(settings), encoding="utf-8")
    return path


DYING = """
import os, signal
import hla.train
from hla.cli import main
real = hla.train._Run.one_step
def one_step(self, progress):
    record = real(self, progress)
    if self.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return record
hla.train._Run.one_step = one_step
main()
"""


def test_a_lost_rank_is_named_and_torchrun_goes_on(corpus, pool, tmp_path):
    settings = {"steps": 7, "save_every": 4}
    pool(2).run(run_train, config(corpus, tmp_path / "whole", (1, 2, 1), **settings))
    out = tmp_path / "run"
    (tmp_path / "dying.py").write_text(DYING)
    file = settings_file(config(corpus, out, (1, 2, 1), **settings), tmp_path)
    process = start(2, tmp_path / "dying.py", "train", "--config", file, "--sp", "2", "--resume", restarts=1)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert errors.count("hla: ") == 1 and "hla: rank 1 was lost: its process has ended" in errors
    assert errors.count("Going on from step 4.") == 1
    assert timeless(out) == timeless(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_and_ends(number, corpus, tmp_path):
    out = tmp_path / "run"
    file = settings_file(config(corpus, out, steps=100_000, eval_every=10**6, save_every=10**6), tmp_path)
    process = start(2, "-m", "hla.cli", "train", "--config", file, "--tp", "2")
    end = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < end and not (
        (out / "metrics.jsonl").exists() and len(records(out)) > 3
    ):  # fmt: skip
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)  # as a scheduler does it
    _, errors = process.communicate(timeout=TIMEOUT)
    assert errors.count(f"Stopped by {number.name}: the model is in '{out}'") == 1, errors
    assert "was lost" not in errors and process.returncode != 0
    assert (
        checkpoints(out) and read_state(checkpoints(out)[-1])["step"] == max(losses(out)) == load_model(out)[2]["steps"]
    )


ENDING = """
import os
import sys
import torch.distributed as dist
from hla.cli import main
try:
    main()
finally:
    if os.environ["RANK"] == "0":
        print("there is still a group" if dist.is_initialized() else "no group is left", file=sys.stderr)
"""


def test_an_error_of_all_ranks_ends_their_group(corpus, tmp_path):
    """The output is looked at by the first rank, for all; what NCCL warns of would hide the sentence."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    (tmp_path / "ending.py").write_text(ENDING)
    file = settings_file(config(corpus, tmp_path / "run"), tmp_path)
    _, errors = start(2, tmp_path / "ending.py", "train", "--config", file).communicate(timeout=TIMEOUT)
    assert "holds other files" in errors and "no group is left" in errors, errors


@pytest.mark.parametrize("options, sentence", [
    ("--sp 3", "dp 1 x sp 3 x tp 1 = 3 processes, but torchrun has started 2"),
    ("--tp 2 --set num_attention_heads=1", "cannot be spread with --tp 2: num_kv_heads must be divisible"),
])  # fmt: skip
def test_an_error_is_told_once(options, sentence, corpus, tmp_path):
    file = settings_file(config(corpus, tmp_path / "run"), tmp_path)
    process = start(2, "-m", "hla.cli", "train", "--config", file, *options.split())
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert len(re.findall("^hla: ", errors, re.MULTILINE)) == 1 and sentence in errors, errors
    assert not (tmp_path / "run").exists()
