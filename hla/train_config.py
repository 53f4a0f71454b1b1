"""``TrainConfig``: every setting of a training run, checked, and as a TOML file.

The command line, a file (``hla train --config run.toml``) and the file that every run leaves (train.toml) all make this
one dataclass. Names, defaults and checks are here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hla.errors import HLAError

RUN_FILE = "train.toml"  # in the folder of a run: its settings, from which --resume goes on
# About how a run is started, not about the run: no part of the file. It goes on with any number of processes.
START_ONLY = ("overwrite", "resume", "dp", "sp", "tp", "shard")
# May not differ when a run goes on: its weights, its optimizer or its place in the data would mean something else.
FIXED = (
    "data", "weights", "size", "attention", "model", "tokenizer", "vocab_size", "context", "batch_size", "accumulate",
    "seed", "dtype", "recompute", "compile",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. Values that mean nothing raise :class:`HLAError` at once."""

    # Text files, folders, globs, "-", "hf:NAME", folders of hla tokenize; nothing: the built-in corpus.
    data: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # how often rows come from each of data; nothing: all of it is one text
    out: str = "runs/hla"
    overwrite: bool = False
    resume: bool = False  # go on with the run in out, if there is one
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
    keep: int = 2  # checkpoints, the newest ones
    max_skipped: int = 5  # steps in a row whose loss or gradient is not finite: so many end the run
    telemetry_every: int = 100  # steps
    recompute: bool = False  # activations in the backward pass, layer by layer, instead of keeping them
    compile: bool = False  # with torch.compile
    # Micro-batches as CUDA graphs, where a GPU has the whole model; None: there, without compile. Numbers are the same.
    cuda_graphs: bool | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    dp: int | None = None  # under torchrun: ranks that share the rows of a batch; None: all that sp and tp leave
    sp: int = 1  # ... that share each sequence
    tp: int = 1  # ... that share the heads of each layer
    # Whether ranks of dp share weights, gradients and moments (FSDP) or have all of them; None: see `shares`.
    shard: bool | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", 1000)
        counts = ("context", "batch_size", "accumulate", "eval_every", "save_every", "keep", "max_skipped")
        for name in (*counts, "telemetry_every", "sp", "tp"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _check(self.dp is None or self.dp >= 1, f"dp must be at least 1, not {self.dp}")
        _check(self.steps is None or self.steps >= 1, f"steps must be at least 1, not {self.steps}")
        _check(self.minutes is None or _positive(self.minutes), f"minutes must be positive, not {self.minutes}")
        _check(_positive(self.lr), f"the learning rate must be a positive number, not {self.lr}")
        _check(_positive(self.clip), f"clip must be a positive number, not {self.clip}")
        for name in ("warmup", "weight_decay"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, f"{name} must be a number from 0 on, not {value}")
        for weight in self.weights:
            _check(_positive(weight), f"weights must be positive numbers, not {weight}")
        if self.weights:
            _check(
                len(self.weights) == len(self.data),
                f"there are {len(self.weights)} weights for {len(self.data)} sources of data; each source needs one",
            )
        for name, value in self.model.items():
            _check(value is not None, f"the model option {name!r} has no value: leave it out instead")
        _check(0 <= self.seed < 1 << 63, f"the seed must be from 0 to 2^63 - 1, not {self.seed}")
        _check(self.dtype in ("auto", "float32", "bfloat16"), f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        _check(bool(self.out), "the output folder has no name")
        _check(not (self.overwrite and self.resume), "overwrite and resume exclude each other")
        _check(not (self.compile and self.cuda_graphs), "compile and cuda_graphs exclude each other")

    def captures(self, device: str) -> bool:
        """Whether one process captures its micro-batches in CUDA graphs on a device of this type."""
        # Where values are checked (HLA_CHECK) the host waits for the device, which a capture cannot.
        wanted = not self.compile and os.environ.get("HLA_CHECK") != "1"
        return device == "cuda" and (wanted if self.cuda_graphs is None else self.cuda_graphs)

    def shares(self, mesh: tuple[int, int, int], device: str, parameters: int, memory: int) -> bool:
        """Whether the weights, gradients and moments of a model are shared out over the ranks of dp.

        They are with tp, on CPUs, when compiled, and where they would take more than a quarter of a device's
        ``memory`` (bytes).
        """
        if self.shard is not None or self.cuda_graphs:
            return bool(self.shard)
        return mesh[2] != 1 or device != "cuda" or self.compile or 16 * parameters > memory // 4

    def mesh(self, ranks: int) -> tuple[int, int, int]:
        """The sizes of dp, sp and tp for so many processes.

        Raises:
            HLAError: they are not as many, or the batch or the context cannot be shared out among them; or a setting
                is for one process.
        """
        dp = self.dp if self.dp is not None else max(ranks // (self.sp * self.tp), 1)
        wanted = dp * self.sp * self.tp
        product = f"dp {dp} x sp {self.sp} x tp {self.tp} = {wanted}"
        if ranks == 1 and wanted > 1:
            raise HLAError(f"{product} processes, but there is one: start it with torchrun --nproc-per-node {wanted}")
        _check(wanted == ranks, f"{product} processes, but torchrun has started {ranks}")
        _check(self.batch_size % dp == 0, f"batch_size must be divisible by dp: {self.batch_size} rows for {dp} ranks")
        _check(
            self.context % self.sp == 0, f"context must be divisible by sp: {self.context} tokens for {self.sp} ranks"
        )
        whole = ranks == 1 or (self.tp == 1 and not self.shard)
        _check(whole or not self.cuda_graphs, "cuda_graphs needs the whole model on each GPU: no tp, no --shard")
        _check(
            ranks == 1 or self.shard is not False or (self.tp == 1 and not self.compile),
            "with --no-shard every rank has the whole model: that goes with dp and sp, and without --compile",
        )
        _check(ranks == 1 or "-" not in self.data, "standard input cannot be read by several processes: use a file")
        return dp, self.sp, self.tp


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise HLAError(sentence)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a TOML file by name, of the right types; ``TrainConfig(**read_config(path))`` checks the values.

    Raises:
        HLAError: the file is missing or no TOML, a name is unknown, or a value has the wrong type.
    """
    where = repr(str(path))
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise HLAError(f"cannot read the configuration {where}: {error.strerror or error}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise HLAError(f"the configuration {where} is not TOML: {error}") from error
    types = typing.get_type_hints(TrainConfig)
    settings = {}
    for name, value in content.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise HLAError(f"the configuration {where} has an unknown setting {name!r}{hint}")
        settings[name] = _typed(value, types[name], f"in the configuration {where}, {name}")
    return settings


def _typed(value: Any, kind: Any, what: str) -> Any:
    """``value`` as TOML has it in the type ``kind`` of a field; TOML's types are not converted, except int to float."""
    if isinstance(kind, type(int | None)):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_typed(v, item, what) for v in (value if isinstance(value, list) else [value]))
    if typing.get_origin(kind) is dict:
        kind = dict
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a table"}
        raise HLAError(f"{what} must be {names[kind]}, not {value!r}")
    return value


def config_text(config: TrainConfig) -> str:
    """The settings of a run as TOML: all of them, those that stand for nothing left out."""
    lines = ["# Settings of this run, all of them: hla train --config FILE repeats it, --resume goes on with it."]
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if setting.name not in (*START_ONLY, "model") and value is not None:
            lines.append(f"{setting.name} = {_toml(value)}")
    if config.model:  # a table: it must be last
        lines += ["", "[model]", *(f"{_key(name)} = {_toml(value)}" for name, value in config.model.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON text and numbers are TOML


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def write_config(config: TrainConfig, path: Path) -> None:
    """Write :func:`config_text` to ``path``, as a whole or not at all. Raises OSError."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(config_text(config), encoding="utf-8")
    os.replace(draft, path)


def resolve(flags: Mapping[str, Any], file: Path | None = None) -> TrainConfig:
    """One configuration of what was given: flags win over ``file``, and that over the defaults.

    With ``resume`` and no file, the settings of the run in ``out`` stand in for the file.

    Args:
        flags: settings by name, those given on the command line alone; ``model`` is merged option by option.

    Raises:
        HLAError: see :func:`read_config` and :class:`TrainConfig`.
    """
    settings = {} if file is None else read_config(file)
    resumed = Path(flags.get("out", TrainConfig.out)) / RUN_FILE
    if file is None and flags.get("resume") and resumed.is_file():
        settings = {**read_config(resumed), "out": str(flags.get("out", TrainConfig.out))}
    model = {**settings.get("model", {}), **flags.get("model", {})}
    return TrainConfig(**{**settings, **flags, "model": model})


def check_resumed(config: TrainConfig, saved: TrainConfig) -> None:
    """See that a run may go on with ``config`` where it began with ``saved``.

    Raises:
        HLAError: naming a setting that would make another run of it.
    """
    for name in FIXED:
        new, old = getattr(config, name), getattr(saved, name)
        if new != old:
            raise HLAError(
                f"the run in {config.out!r} has {name} = {_toml(old)}, not {_toml(new)}; a run that goes on may differ "
                f"from before in anything but {', '.join(FIXED)}"
            )
