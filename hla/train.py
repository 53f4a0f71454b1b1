"""Train a language model on text: one configuration, one step function, one loop.

What a run is made of stands apart so that more can be built from it: ``TrainConfig`` (every setting, checked),
``prepare`` (text to token streams), ``build_model``, ``build_optimizer``, ``learning_rate``, ``train_step``, and
``train``, which puts them together. The position of a run is its step: batches are a function of (seed, step).
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from hla.checkpoint import METRICS_FILE, check_output, open_output, save_model
from hla.data import (
    DEFAULT_CORPUS,
    Batch,
    Split,
    TokenStream,
    build_tokenizer,
    encode_documents,
    fingerprint,
    read_documents,
    split_documents,
    token_bytes,
)
from hla.errors import HLAError
from hla.evaluate import Evaluation, evaluate
from hla.plots import plot_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FINAL_LEARNING_RATE = 0.1  # of the peak, at the end of the cosine
EVAL_WINDOWS = 64  # scored in validations along the way; the one at the end scores the whole held-out text


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; written to training.json. Values that mean nothing raise :class:`HLAError` at once."""

    data: tuple[str, ...] = ()  # files, folders, globs, "-"; nothing: the built-in corpus
    out: str = "runs/hla"
    overwrite: bool = False
    size: str = "tiny"  # a name in hla.models.SIZES
    attention: str = "hla"  # "hla", "softmax" or a pattern such as "hla,hla,softmax", repeated over the layers
    model: dict[str, Any] = field(default_factory=dict)  # other HLAConfig fields by name
    tokenizer: str = "bpe"
    vocab_size: int = 2048
    context: int = 256  # tokens per row
    batch_size: int = 4  # rows per micro-batch
    accumulate: int = 1  # micro-batches per step
    lr: float = 5e-3
    steps: int | None = None  # 1000 if minutes is None too
    minutes: float | None = None  # end after this time instead of (or, with both, no later than) a number of steps
    warmup: float = 0.02  # below 1: share of the run; from 1 on: steps
    weight_decay: float = 0.1
    clip: float = 1.0  # largest gradient norm
    eval_every: int = 200  # steps
    save_every: int = 1000  # steps
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", 1000)
        for name in ("context", "batch_size", "accumulate", "eval_every", "save_every"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _check(self.steps is None or self.steps >= 1, f"steps must be at least 1, not {self.steps}")
        _check(self.minutes is None or _positive(self.minutes), f"minutes must be positive, not {self.minutes}")
        _check(_positive(self.lr), f"the learning rate must be a positive number, not {self.lr}")
        _check(_positive(self.clip), f"clip must be a positive number, not {self.clip}")
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, f"{name} must be a number from 0 on, not {value}")
        _check(0 <= self.seed < 1 << 63, f"the seed must be from 0 to 2^63 - 1, not {self.seed}")
        _check(self.dtype in ("auto", "float32", "bfloat16"), f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        _check(bool(self.out), "the output folder has no name")


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise HLAError(sentence)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


# ---------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Prepared:
    """Tokenized text of a run."""

    tokenizer: PreTrainedTokenizerFast
    split: Split
    train: TokenStream
    held_out: TokenStream


def prepare(config: TrainConfig) -> Prepared:
    """Read, split and tokenize the text.

    Raises:
        HLAError: see :mod:`hla.data`; also when the training text is shorter than one context.
    """
    split = split_documents(read_documents(config.data), config.seed)
    tokenizer = build_tokenizer(config.tokenizer, config.vocab_size, split.train)
    train = encode_documents(tokenizer, split.train)
    if train.steps_per_epoch(config.batch_size, config.context) == 0:
        raise HLAError(
            f"the training text has {len(train)} tokens, fewer than one context of {config.context}: "
            "give more text or a smaller --context"
        )
    return Prepared(tokenizer, split, train, encode_documents(tokenizer, split.held_out))


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is the GPU if there is one.

    Raises:
        HLAError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HLAError(f"unknown device {name!r}: choose auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise HLAError(f"unknown device {name!r}: choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HLAError(f"the device {name!r} needs a CUDA GPU and a PyTorch built for it; there is none here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HLAError(f"there is no device {name!r}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def model_settings(config: TrainConfig) -> dict[str, Any]:
    """The HLAConfig fields that ``config`` asks for; those of the tokenizer are missing.

    Raises:
        HLAError: unknown size, kind of layer or option.
    """
    from hla.models import SIZES, HLAConfig

    if config.size not in SIZES:
        raise HLAError(f"unknown size {config.size!r}: choose one of {', '.join(SIZES)}")
    known = {field.name for field in dataclasses.fields(HLAConfig)} - {"vocab_size", "bos_token_id", "eos_token_id"}
    for name in config.model:
        if name not in known:
            raise HLAError(f"the model has no option {name!r} to set")
    settings = {**SIZES[config.size], "max_position_embeddings": config.context, **config.model}
    return {"layer_types": layer_types(config.attention, settings["num_hidden_layers"]), **settings}


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new model of the configured size for this tokenizer, its weights drawn with ``config.seed``; float32, CPU.

    Raises:
        HLAError: see :func:`model_settings`; also a value that means nothing.
    """
    from hla.models import HLAConfig, HLAForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = model_settings(config)
    try:
        torch.manual_seed(config.seed)
        return HLAForCausalLM(HLAConfig(**settings, **ids, vocab_size=len(tokenizer)))
    except (ValueError, TypeError) as error:
        raise HLAError(f"the model cannot be built: {error}") from error


def layer_types(pattern: str, layers: int) -> list[str]:
    """Spell out a pattern: ``layer_types("hla,softmax", 3)`` is linear, full, linear.

    Raises:
        HLAError: an unknown kind of layer.
    """
    kinds = {"hla": "linear_attention", "softmax": "full_attention"}
    names = [name.strip() for name in pattern.split(",")]
    for name in names:
        if name not in kinds:
            raise HLAError(f"unknown attention {name!r}: choose hla or softmax, or a pattern such as hla,hla,softmax")
    return [kinds[names[i % len(names)]] for i in range(layers)]


def build_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on norms, biases, convolutions or per-head numbers."""
    # By the kind of module: the taps of a depthwise convolution are a two-dimensional tensor too, but no matrix.
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)


def learning_rate(peak: float, progress: float, step: int, warmup: float) -> float:
    """Linear warm-up times a cosine from ``peak`` to a tenth of it.

    Args:
        progress: how much of the run is over, 0 to 1; by steps or by the clock.
        step: steps done.
        warmup: below 1 a share of the run, from 1 on a number of steps.
    """
    ramp = (step + 1) / warmup if warmup >= 1 else progress / warmup if warmup > 0 else 1.0
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return peak * min(ramp, 1.0) * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    clip: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """One optimizer step on the mean loss over all tokens of ``batches`` (micro-batches, one after the other).

    Returns:
        (loss in nats per token, gradient norm before clipping). If either is not finite the weights stay as they were.
    """
    total = sum(batch.targets.numel() for batch in batches)
    loss = 0.0
    for batch in batches:
        targets = batch.targets[0].to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(**batch.inputs(model.device), use_cache=False).logits
        part = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum") / total
        part.backward()
        loss += part.item()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def batches_of_step(stream: TokenStream, config: TrainConfig, step: int) -> list[Batch]:
    """The micro-batches of ``step``: a function of the data, the configuration and the step alone."""
    per_epoch = stream.steps_per_epoch(config.batch_size, config.context)
    places = (divmod(step * config.accumulate + i, per_epoch) for i in range(config.accumulate))
    return [
        stream.batch(epoch, within, rows=config.batch_size, context=config.context, seed=config.seed)
        for epoch, within in places
    ]


class Metrics:
    """Numbers along the way: kept, appended to metrics.jsonl and written for TensorBoard.

    TensorBoard's own writer works in a thread of its own, where a full disk ends in a traceback; written here, its
    events fail like everything else.
    """

    def __init__(self, folder: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._folder = folder
        self._files = ExitStack()

    def open(self) -> None:
        """Open the files; raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        (self._folder / "tensorboard").mkdir(exist_ok=True)
        events = self._folder / "tensorboard" / f"events.out.tfevents.{int(time.time())}.hla"
        self._lines = self._files.enter_context((self._folder / METRICS_FILE).open("a", encoding="utf-8"))
        self._events = RecordWriter(self._files.enter_context(events.open("wb")))
        self._events.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def add(self, kind: str, record: dict[str, Any]) -> None:
        """Log a record with ``step`` and numbers; ``kind`` groups them in TensorBoard. Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.records.append(record)
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        values = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in record.items() if name != "step"
        ]
        event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        self._events.write(event.SerializeToString())
        self._events.flush()

    def close(self) -> None:
        """Close the files; all that was added has been written or has failed before."""
        with suppress(OSError):
            self._files.close()


@contextmanager
def stop_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Take note of the first SIGINT or SIGTERM instead of ending at once; a second one ends as usual.

    Yields a function that returns the signal, or None.
    """
    caught: list[signal.Signals] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in handled}

    def restore() -> None:
        for number in handled:
            signal.signal(number, before[number])

    def note(number: int, frame: object) -> None:
        caught.append(signal.Signals(number))
        restore()

    for number in handled:
        signal.signal(number, note)
    try:
        yield lambda: caught[0] if caught else None
    finally:
        restore()


# ---------------------------------------------------------------------------------------------------- the run


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

    The folder gets the model at every ``save_every`` steps, at the end, and on SIGINT or SIGTERM; metrics.jsonl,
    tensorboard/ and loss.png grow along the way.

    Args:
        console: where progress is shown (default: standard error).

    Raises:
        HLAError: something in the configuration, the data or the output folder is wrong, or the loss is not finite;
            the sentence says which model was saved last.
    """
    console = console or Console(stderr=True)
    folder = Path(config.out)
    check_output(folder, config.overwrite)  # this and the next before the text is read, which takes a while
    model_settings(config)
    device = choose_device(config.device)
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    prepared = prepare(config)
    model = build_model(config, prepared.tokenizer)
    for line in (
        prepared.split.describe(),
        f"{sum(p.numel() for p in model.parameters()):,} parameters ({config.size}, {config.attention}), "
        f"{len(prepared.tokenizer):,} token ids, {len(prepared.train):,} training tokens, {device}, "
        f"{'bfloat16 autocast' if half else 'float32'}.",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    torch.nn.Module.to(model, device)  # in place; transformers hides the type of its own
    open_output(folder, config.overwrite)
    run = _Run(config, prepared, model, torch.bfloat16 if half else torch.float32, console)
    try:
        run.metrics.open()
        with stop_signals() as stop:
            stopped_by = run.loop(stop)
        return run.finish(stopped_by)
    except OSError as error:
        raise HLAError(f"cannot write to {str(folder)!r}: {error.strerror or error}. {run.last_saved()}") from error
    except HLAError as error:
        raise HLAError(f"{error}. {run.last_saved()}") from error
    finally:
        run.metrics.close()


class _Run:
    """The state of a run and its loop."""

    def __init__(
        self, config: TrainConfig, prepared: Prepared, model: PreTrainedModel, dtype: torch.dtype, console: Console
    ) -> None:
        self.config, self.prepared, self.model, self.dtype, self.console = config, prepared, model, dtype, console
        self.folder = Path(config.out)
        self.optimizer = build_optimizer(model, config.lr, config.weight_decay)
        self.metrics = Metrics(self.folder)
        self.sizes = [len(text) for text in token_bytes(prepared.tokenizer)]
        self.step = 0
        self.tokens = 0
        self.saved_at: int | None = None
        self.start = time.monotonic()
        self.seconds = 0.0

    def loop(self, stop: Callable[[], signal.Signals | None]) -> signal.Signals | None:
        """Step until the steps or the minutes are over or ``stop`` returns a signal, then save; returns the signal."""
        config = self.config
        stopped_by = None
        self.start = time.monotonic()
        self.model.train()
        columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[now]}"))
        with Progress(*columns, console=self.console, refresh_per_second=2) as bar:
            task = bar.add_task("training", total=1.0, now="")
            while (done := self.progress()) < 1.0 and not (stopped_by := stop()):
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
        by_clock = (time.monotonic() - self.start) / (60 * self.config.minutes) if self.config.minutes else 0.0
        return max(by_steps, by_clock)

    def one_step(self, progress: float) -> dict[str, Any]:
        """Train one step and log it; returns the record."""
        config = self.config
        begin = time.monotonic()
        rate = learning_rate(config.lr, progress, self.step, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = batches_of_step(self.prepared.train, config, self.step)
        loss, norm = train_step(self.model, self.optimizer, batches, clip=config.clip, dtype=self.dtype)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise HLAError(
                f"training stopped: at step {self.step + 1} the loss is {loss} and the gradient norm {norm}; "
                "try a smaller --lr"
            )
        self.step += 1
        tokens = sum(batch.targets.numel() for batch in batches)
        self.tokens += tokens
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": time.monotonic() - self.start,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / (time.monotonic() - begin),
        }
        self.metrics.add("train", record)
        return record

    def validate(self, max_windows: int | None) -> Evaluation:
        """Score held-out text (all of it, or some windows), log and show the result."""
        config = self.config
        result = evaluate(
            self.model,
            self.prepared.held_out,
            self.sizes,
            context=config.context,
            rows=config.batch_size,
            max_windows=max_windows,
            dtype=self.dtype,
        )
        record = {f"val_{name}": value for name, value in result.as_dict().items()}
        seconds = time.monotonic() - self.start
        self.metrics.add("validation", {"step": self.step, "tokens": self.tokens, "seconds": seconds, **record})
        self.say(
            f"step {self.step}, {_clock(seconds)}: validation loss {result.loss:.4f} nats per token, perplexity "
            f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte ({result.tokens:,} tokens)"
        )
        return result

    def save(self, evaluation: Evaluation | None) -> None:
        """Put the model, the tokenizer, training.json and the picture into the folder."""
        import transformers

        split = self.prepared.split
        training = {
            "config": {**dataclasses.asdict(self.config), "data": absolute_sources(self.config.data)},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": round(time.monotonic() - self.start, 1),
            "held_out": {
                "documents": len(split.held_out),
                "bytes": sum(d.size for d in split.held_out),
                "sha256": fingerprint(split.held_out),
            },
            "evaluation": evaluation.as_dict() if evaluation else None,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        save_model(self.folder, self.model, self.prepared.tokenizer, training)
        self.saved_at = self.step
        plot_loss(self.metrics.records, self.folder / "loss.png", f"{self.folder.name}: {self.config.size} model")

    def last_saved(self) -> str:
        """A sentence on what is left of the run, for messages."""
        if self.saved_at is None:
            return "No model was saved"
        return f"The model of step {self.saved_at} is in {str(self.folder)!r}"

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def absolute_sources(sources: Sequence[str]) -> list[str]:
    """The sources of a run so that they mean the same from any working folder."""
    return [s if s in ("-", DEFAULT_CORPUS) and not Path(s).exists() else str(Path(s).absolute()) for s in sources]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
