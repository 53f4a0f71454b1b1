"""Train a language model on text: one configuration, one step function, one loop.

What a run is made of stands apart so that more can be built from it: ``TrainConfig`` (every setting, checked) in
train_config.py, ``prepare`` (text to token streams) in sources.py, ``build_model``, ``build_optimizer`` and
``learning_rate`` in build.py; here are ``train_step``, and ``train``, which puts them together. The position of a run
is its step: batches are a function of (seed, step).
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from hla.build import build_model, build_optimizer, check_model, learning_rate, recompute_activations
from hla.checkpoint import METRICS_FILE, TRAINING_FILE, check_output, open_output, recover, save_model
from hla.data import (
    DEFAULT_CORPUS,
    HUB,
    Batch,
    Row,
    build_tokenizer,
    fingerprint,
    pack_rows,
    stream_documents,
    token_bytes,
)
from hla.devices import choose_dtype, rank_device
from hla.distributed.world import World, before_meeting, meet, ranks_started, told_by
from hla.errors import HLAError
from hla.evaluate import Evaluation, evaluate
from hla.graphed import GraphedTraining
from hla.loss import mean_loss
from hla.metrics import Metrics
from hla.plots import plot_loss
from hla.signals import stop_signals
from hla.sources import Prepared, prepare, step_rows
from hla.telemetry import Watch, layer_values, measure
from hla.token_files import absolute_sources, is_token_folder
from hla.train_config import RUN_FILE, START_ONLY, TrainConfig, check_resumed, config_text, read_config, write_config
from hla.training_state import newest, restore, run_tensors, save_checkpoint
from hla.update import clip_and_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hla.distributed.training import Spread

EVAL_WINDOWS = 64  # scored in validations along the way; the one at the end scores the whole held-out text


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    clip: float,
    dtype: torch.dtype = torch.float32,
    graphed: GraphedTraining | None = None,
) -> tuple[float, float]:
    """One optimizer step on the mean loss over all tokens of ``batches`` (micro-batches, one after the other).

    Args:
        graphed: of the same model and dtype; the same numbers, with CUDA graphs.

    Returns:
        (loss in nats per token, gradient norm before clipping). If either is not finite the weights stay as they were.
    """
    total = sum(batch.targets.numel() for batch in batches)
    parts = []
    for batch in batches:
        inputs, targets = batch.inputs(model.device), batch.targets[0].to(model.device)
        if graphed is None:
            part = mean_loss(model, inputs, targets, total, dtype)
            part.backward()
        else:
            part = graphed(inputs, targets, total)
        parts.append(part.detach())
    losses = torch.stack(parts)
    norm = clip_and_step(optimizer, clip, losses)
    if graphed is None:
        optimizer.zero_grad(set_to_none=True)
    else:
        graphed.zero_grad()
    *values, norm_found = torch.cat([losses, norm[None]]).tolist()  # one wait for the device
    loss = 0.0
    for value in values:
        loss += value
    return loss, norm_found


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with; ``evaluation`` is of the whole held-out text, None if a signal stopped the run."""

    folder: Path
    steps: int
    tokens: int
    seconds: float
    evaluation: Evaluation | None
    stopped_by: signal.Signals | None


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Train a model and leave it in ``config.out``.

    The folder gets the model and a checkpoint at every ``save_every`` steps, at the end, and on SIGINT or SIGTERM;
    train.toml says how the run was configured; metrics.jsonl, tensorboard/ and loss.png grow along the way. With
    ``config.resume`` the run in that folder goes on from its newest checkpoint that is whole, to the bit as if it had
    never stopped (on the same device, with the same number of threads and processes); if there is no run yet, it
    begins.

    Under torchrun, or where a process group is there, every process calls this with the same configuration, and the
    processes together make the run that one would make, up to rounding.

    Args:
        console: where progress is shown (default: standard error); the first of several processes alone shows it.

    Raises:
        HLAError: something in the configuration, the data or the output folder is wrong, or losses or gradients are not
            finite for ``config.max_skipped`` steps in a row; the sentence says which model was saved last.
    """
    with before_meeting():
        mesh = config.mesh(ranks_started())
        device = rank_device(config.device, ranks_started())
        if config.overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            raise HLAError("torchrun has restarted a run with --overwrite, which would delete it: use --resume instead")
        # All that can be wrong with a command is said now: later, text has been read, and ranks wait for one another.
        check_model(config, mesh)
        _check_data(config)
    met_before = dist.is_available() and dist.is_initialized()
    try:
        with ExitStack() as behind_all, meet(device) as world:
            return _train(config, console or Console(stderr=True), world, mesh, device, behind_all)
    except Exception as error:
        # All ranks have this error, so none waits for the end of another; NCCL warns of a group that nobody ends.
        if told_by(error) and dist.is_initialized() and not met_before:
            dist.destroy_process_group()
        raise


def _check_data(config: TrainConfig) -> None:
    """See that the sources are there and the tokenizer can be made, while next to nothing is read.

    Raises:
        HLAError: what reading would say of a name that stands for nothing, or making the tokenizer of its settings.
    """
    if not any(is_token_folder(Path(source)) for source in config.data):  # these bring their own
        build_tokenizer(config.tokenizer, config.vocab_size, ())
    for source in config.data or (DEFAULT_CORPUS,):
        files = (name for name in glob.iglob(source, recursive=True) if Path(name).is_file())
        there = source == "-" or Path(source).exists() or any(files)
        if not there and not (source.startswith(HUB) and find_spec("datasets")):  # or that would be downloaded
            next(stream_documents([source]), None)  # says what is missing; of the built-in corpus it reads one speech


def _train(
    config: TrainConfig,
    console: Console,
    world: World,
    mesh: tuple[int, int, int],
    device: torch.device,
    behind_all: ExitStack,
) -> TrainResult:
    folder = Path(config.out)
    if world.rank != 0:
        console = Console(quiet=True)

    def check() -> bool:
        """Whether a run goes on; before the text is read, which takes a while."""
        goes_on = config.resume and _is_run(folder)
        if goes_on:
            check_resumed(saved_form(config), TrainConfig(**read_config(folder / RUN_FILE)))
            if "-" in config.data:
                raise HLAError(
                    f"the run in {config.out!r} read standard input, which cannot be read again: it cannot go on"
                )
        else:
            check_output(folder, config.overwrite)
        return goes_on

    goes_on = world.first(check)
    if config.resume and not goes_on:
        line = f"There is no run in {config.out!r} to go on with: a new one begins."
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    dtype = choose_dtype(config.dtype, device)
    half = dtype == torch.bfloat16
    prepared = world.together(lambda: prepare(config))
    if len(set(world.gather(prepared.digest))) > 1:
        raise world.common(HLAError("the ranks have read different training data"))
    model = world.together(lambda: build_model(config, prepared.tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    shares = world.size > 1 and config.shares(mesh, device.type, parameters, -int(world.highest(-memory)))
    where, precision = str(device), "bfloat16 autocast" if half else "float32"
    if world.size > 1:
        whole = "" if shares else "; each has the whole model"
        where = f"{world.size} ranks on {device.type} (dp, sp, tp: {mesh[0]}, {mesh[1]}, {mesh[2]}{whole})"
    if shares:
        precision = "bfloat16" if half else "float32"
    for line in (
        prepared.description,
        f"{parameters:,} parameters ({config.size}, {config.attention}), {len(prepared.tokenizer):,} token ids, "
        f"{len(prepared.train):,} training tokens, {where}, {precision}.",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    spread = None
    if shares:
        from hla.distributed.training import Spread

        spread = world.together(lambda: Spread(model, mesh, world, device, dtype, config))
    elif world.size > 1:
        from hla.distributed.replicas import Replicas

        spread = world.together(lambda: Replicas(model, mesh, world, device, dtype, config))
    else:
        torch.nn.Module.to(model, device)  # in place; transformers hides the type of its own
        if config.recompute:
            recompute_activations(model)
        if config.compile:
            model.model.compile()  # in place: names of weights stay what they are
    if not goes_on:
        world.first(lambda: open_output(folder, config.overwrite, config_text(saved_form(config))))
    run = _Run(config, prepared, model, dtype, console, world, spread, parameters)
    try:
        if goes_on:
            run.go_on()
        world.first(lambda: run.metrics.open(run.step, run.logged))
        if spread is None:
            with stop_signals() as stop:
                stopped_by = run.loop(stop)
        else:
            # Until this rank has left the others: all of them stop after the same step, or evaluate together; and one
            # that has lost another must live to tell, while torchrun is already ending it.
            stopped_by = run.loop(behind_all.enter_context(stop_signals(patient=True)))
        return run.finish(stopped_by)
    except OSError as error:
        raise HLAError(f"cannot write to {str(folder)!r}: {error.strerror or error}. {run.last_saved()}") from error
    except HLAError as error:
        raise HLAError(f"{error}. {run.last_saved()}") from error
    finally:
        try:
            run.metrics.close()
        finally:
            if spread is not None:
                spread.leave()


def saved_form(config: TrainConfig) -> TrainConfig:
    """What a run says of its configuration: sources mean the same from any working folder."""
    return dataclasses.replace(config, data=tuple(absolute_sources(config.data)))


def _is_run(folder: Path) -> bool:
    """Whether ``folder`` is one that --resume can go on with."""
    if not (folder / METRICS_FILE).is_file():
        with suppress(OSError):
            recover(folder)
    if (folder / METRICS_FILE).is_file() and not (folder / RUN_FILE).is_file():
        raise HLAError(f"the run in {str(folder)!r} cannot go on: it has no {RUN_FILE}")
    return (folder / RUN_FILE).is_file() and (folder / METRICS_FILE).is_file()


class _Run:
    """The state of a run and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        model: PreTrainedModel,
        dtype: torch.dtype,
        console: Console,
        world: World,
        spread: Spread | None,
        parameters: int,
    ) -> None:
        self.config, self.prepared, self.model, self.dtype, self.console = config, prepared, model, dtype, console
        self.world, self.spread, self.parameters = world, spread, parameters
        self.folder = Path(config.out)
        self.optimizer = build_optimizer(model, config.lr, config.weight_decay)
        graphs = spread is None and config.captures(model.device.type)
        self.graphed = GraphedTraining(model, dtype) if graphs else None
        self.metrics = Metrics(self.folder if world.rank == 0 else None)
        self.watch = Watch()
        self.sizes = [len(text) for text in token_bytes(prepared.tokenizer)]
        self.step = 0  # the position in the data, too: skipped steps count
        self.tokens = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.logged = 0  # records of an earlier process that still hold
        self.stop: Callable[[], signal.Signals | None] = lambda: None  # known in the loop
        self.saved_at: int | None = None
        self.checkpoint_at: int | None = None
        self.start = time.monotonic()
        self.seconds = 0.0  # of earlier processes of this run, and of this one when it is over

    def go_on(self) -> None:
        """Take over from the newest checkpoint that is whole, if there is one.

        Raises:
            HLAError: all are damaged, or the data has changed.
        """
        found = self.world.first(lambda: newest(self.folder, self.say))
        if found is None:
            self.say(f"The run in {str(self.folder)!r} has no checkpoint yet: it begins anew.")
        else:
            path, state = found
            if state["data_sha256"] != self.prepared.digest:
                raise self.world.common(
                    HLAError("the training data has changed since the run began, so it cannot go on")
                )
            self.world.together(
                lambda: (
                    restore(path, self.model, self.optimizer)
                    if self.spread is None
                    else self.spread.restore(path, self.optimizer)
                )
            )
            for name in ("step", "tokens", "seconds", "skipped", "skipped_in_a_row", "logged"):
                setattr(self, name, state[name])
            self.checkpoint_at = self.step
            with suppress(OSError, ValueError):  # a kill may have come between the checkpoint and the model
                self.saved_at = json.loads((self.folder / TRAINING_FILE).read_text(encoding="utf-8"))["steps"]
            self.say(f"Going on from step {self.step}.")
            if self.config.steps is not None and self.step >= self.config.steps:
                self.say(f"All {self.config.steps} steps are done: only a larger --steps trains further.")
        self.world.first(lambda: write_config(saved_form(self.config), self.folder / RUN_FILE))

    def loop(self, stop: Callable[[], signal.Signals | None]) -> signal.Signals | None:
        """Step until the steps or the minutes are over or ``stop`` returns a signal, then save; returns the signal."""
        config = self.config
        stopped_by = None
        self.stop = lambda: self.signal(stop)
        self.watch = Watch(layer_values(record) for record in self.metrics.records)
        self.start = time.monotonic() - self.seconds
        self.model.train()
        columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[now]}"))
        with Progress(*columns, console=self.console, refresh_per_second=2) as bar:
            task = bar.add_task("training", total=1.0, now="")
            bar.update(task, completed=min(self.progress(), 1.0))  # of a run that goes on
            while (done := self.progress()) < 1.0 and not (stopped_by := self.stop()):
                record = self.one_step(done)
                done = self.progress()
                left = record["seconds"] * (1 - done) / done
                rate = record["tokens_per_second"]
                now = f"step {self.step}  loss {record['loss']:.3f}  {rate:,.0f} tokens/s  {_clock(left)} left"
                bar.update(task, completed=min(done, 1.0), now=now)
                if done < 1.0 and self.step % config.eval_every == 0:
                    self.validate(EVAL_WINDOWS)
                if done < 1.0 and self.step % config.save_every == 0:
                    self.save(None)
        self.seconds = time.monotonic() - self.start
        if self.step:
            self.save(None)
        return stopped_by

    def finish(self, stopped_by: signal.Signals | None) -> TrainResult:
        """Score the whole held-out text unless the run was stopped; Ctrl-C gives up on that alone."""
        evaluation = None
        if stopped_by is None:
            try:
                evaluation = self.validate(None)
                self.save(evaluation)
            except KeyboardInterrupt:
                stopped_by = signal.SIGINT
        return TrainResult(self.folder, self.step, self.tokens, self.seconds, evaluation, stopped_by)

    def progress(self) -> float:
        """How much of the run is over, by steps or by the clock, whichever is ahead."""
        by_steps = self.step / self.config.steps if self.config.steps else 0.0
        if not self.config.minutes:
            return by_steps
        return max(by_steps, self.world.same((time.monotonic() - self.start) / (60 * self.config.minutes)))

    def signal(self, stop: Callable[[], signal.Signals | None]) -> signal.Signals | None:
        """What ``stop`` returns, on any rank."""
        number = int(self.world.highest(stop() or 0))
        return signal.Signals(number) if number else None

    def one_step(self, progress: float) -> dict[str, Any]:
        """Train one step and log it; returns the record. A step without finite loss and gradient is skipped."""
        config = self.config
        begin = time.monotonic()
        rate = learning_rate(config.lr, progress, self.step, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = step_rows(self.prepared.train, config, self.step)
        if self.spread is None:
            batches = [pack_rows(part) for part in rows]
            how: Any = {"clip": config.clip, "dtype": self.dtype, "graphed": self.graphed}
            loss, norm = train_step(self.model, self.optimizer, batches, **how)
        else:
            loss, norm = self.spread.step(self.optimizer, rows, config.clip)
        self.step += 1
        tokens = sum(length for part in rows for _, _, length in part)
        record = {
            "step": self.step,
            "tokens": self.tokens + tokens,
            "seconds": time.monotonic() - self.start,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / (time.monotonic() - begin),
        }
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skip(loss, norm)
            return record
        self.skipped_in_a_row = 0
        self.tokens += tokens
        self.metrics.add("train", record)
        if self.step == 1 or self.step % config.telemetry_every == 0:
            self.observe(rows[0])
        return record

    def skip(self, loss: float, norm: float) -> None:
        """Count a step that changed nothing; raises HLAError when there have been too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.metrics.add("skipped", {"step": self.step, "skipped": self.skipped})
        what = f"at step {self.step} the loss is {loss} and the gradient norm {norm}"
        if self.skipped_in_a_row >= self.config.max_skipped:
            sentence = f"training stopped: {what}, and so many steps in a row were skipped for that"
            raise self.world.common(HLAError(f"{sentence}: {self.skipped_in_a_row}; try a smaller --lr"))
        self.say(f"Skipped: {what} ({self.skipped} steps skipped so far).")

    def observe(self, rows: list[Row]) -> None:
        """Log the largest states and outputs of the layers, and warn of those that have grown."""
        with self.eager():
            if self.spread is None:
                layers = measure(self.model, pack_rows(rows), self.dtype)
            else:
                layers = self.spread.measure(rows)
        self.metrics.add("layers", {"step": self.step, **layers})
        if grown := self.watch.grown(layers):
            shown = ", ".join(f"{name} = {layers[name]:.3g}" for name in grown[:4])
            self.say(
                f"Warning: at step {self.step} much larger than before: {shown}{', ...' if len(grown) > 4 else ''}. "
                "If that goes on the run will diverge."
            )

    def validate(self, max_windows: int | None) -> Evaluation:
        """Score held-out text (all of it, or some windows), log and show the result."""
        config, held_out = self.config, self.prepared.held_out
        how: Any = {"context": config.context, "rows": config.batch_size, "max_windows": max_windows}
        with self.eager():
            if self.spread is None:
                result = evaluate(self.model, held_out, self.sizes, **how, dtype=self.dtype)
            else:
                ends = self.stop if max_windows is None else lambda: None
                result = self.spread.evaluate(held_out, self.sizes, **how, stop=ends)
        record = {f"val_{name}": value for name, value in result.as_dict().items()}
        seconds = time.monotonic() - self.start
        self.metrics.add("validation", {"step": self.step, "tokens": self.tokens, "seconds": seconds, **record})
        self.say(
            f"step {self.step}, {_clock(seconds)}: validation loss {result.loss:.4f} nats per token, perplexity "
            f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte ({result.tokens:,} tokens)"
        )
        return result

    def eager(self) -> AbstractContextManager[Any]:
        """Without compiled code: it ignores new hooks, and the windows of a validation have too many shapes for it."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()

    def save(self, evaluation: Evaluation | None) -> None:
        """Write a checkpoint, unless this step has one; then model, training.json and picture into the folder."""
        import transformers

        config = {k: v for k, v in dataclasses.asdict(saved_form(self.config)).items() if k not in START_ONLY}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        counts = {"tokens": self.tokens, "skipped": self.skipped}
        seconds = time.monotonic() - self.start
        if self.checkpoint_at != self.step:
            state = {
                **counts,
                "skipped_in_a_row": self.skipped_in_a_row,
                "logged": len(self.metrics.records),
                "seconds": seconds,
                "data_sha256": self.prepared.digest,
                "ranks": self.world.size,
                "config": config,
                "versions": versions,
            }
            self.save_checkpoint(state)
        held = self.prepared.held_documents
        training = {
            "config": config,
            "parameters": self.parameters,
            "steps": self.step,
            **counts,
            "seconds": round(seconds, 1),
            "held_out": {
                "documents": len(held),
                "bytes": sum(d.size for d in held),
                "sha256": fingerprint(held),
            },
            "evaluation": evaluation.as_dict() if evaluation else None,
            "versions": versions,
        }
        whole = self.model if self.spread is None else self.spread.whole()

        def export() -> None:
            assert whole is not None  # on the first rank
            save_model(self.folder, whole, self.prepared.tokenizer, training)
            plot_loss(self.metrics.records, self.folder / "loss.png", f"{self.folder.name}: {self.config.size} model")

        self.world.first(export)
        self.saved_at = self.step

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a checkpoint of this step."""
        if self.spread is None:
            tensors = run_tensors(self.model, self.optimizer)
        else:
            tensors = self.spread.tensors(self.optimizer)
        save_checkpoint(self.folder, self.step, tensors, state, self.config.keep, self.world)
        self.checkpoint_at = self.step

    def last_saved(self) -> str:
        """A sentence on what is left of the run, for messages."""
        if self.saved_at is None:
            return "No model was saved"
        return f"The model of step {self.saved_at} is in {str(self.folder)!r}"

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
