"""Checkpoints of training runs: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder ``checkpoints/step-00001000`` of a run:

- ``*.safetensors``: weights, optimizer state and random state, written by PyTorch's distributed checkpointing (DCP)
  with its Hugging Face writer, one file for each process. Each says which part of which tensor it holds, so that any
  number of processes can read what any number has written (:mod:`hla.distributed.checkpoint`). (DCP's default writer
  pickles its metadata; reading a pickle runs code.)
- ``state.json``: what is no tensor.
- ``manifest.json``: size and SHA-256 of the others, written last.

The folder is written under another name, flushed to the disk and renamed, so that a checkpoint exists as a whole or not
at all. There is no file that says which one is the newest: their names do, and the manifests which are whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from hla.checkpoint import CHECKPOINTS, flush
from hla.distributed.world import World
from hla.errors import HLAError

if TYPE_CHECKING:
    from hla.distributed.checkpoint import Resharding

FORMAT = 1
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"


# ---------------------------------------------------------------------------------------------------- what is saved


def run_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of a run by name: weights, optimizer state, the state of the random generators.

    Weights and optimizer state are the tensors themselves, not copies. (Ranks all have the same random state.)
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _weights(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, resharding: Resharding | None = None
) -> None:
    """Put the tensors of a checkpoint into a model, its optimizer and the random generators.

    Args:
        resharding: of a model that is spread over ranks, all of which call this.

    Raises:
        HLAError: the checkpoint is of another model.
    """

    def whole(name: str, x: torch.Tensor) -> tuple[int, ...]:
        return tuple(x.shape) if resharding is None else resharding.shape(name, x)

    shapes = {name: tuple(tensor.size) for name, tensor in _reader(path).read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    wanted = {f"model.{name}": tensor.detach() for name, tensor in _weights(model).items()}
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        # Moments lie where and how the parameter does; counters are numbers on the CPU, but for the fused optimizer.
        counter = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state = {
            key.removeprefix(prefix): torch.zeros_like(parameter)
            if shape == whole(key, parameter)
            else _zeros(shape).to(counter)
            for key, shape in shapes.items()
            if key.startswith(prefix)
        }
        if state:
            optimizer.state[parameter] = state
            wanted |= {prefix + key: value.detach() for key, value in state.items()}
    device = next(model.parameters()).device
    for name in ("random.cpu", "random.cuda"):
        if name in shapes and (name == "random.cpu" or device.type == "cuda"):
            wanted[name] = _zeros(shapes[name], torch.uint8)
    unread = set(shapes) - set(wanted) - {"random.cuda"}
    if unread or any(shapes.get(name) != whole(name, tensor) for name, tensor in wanted.items()):
        raise HLAError(f"the checkpoint {str(path)!r} is of another model than the one configured")
    read = wanted if resharding is None else resharding.empty(wanted)
    with _no_process_group():
        dcp.load(read, storage_reader=_reader(path))
    if resharding is not None:
        resharding.put(read, wanted)
    torch.set_rng_state(wanted["random.cpu"])
    if "random.cuda" in wanted:
        torch.cuda.set_rng_state(wanted["random.cuda"], device)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and what else state_dict has (buffers), tied tensors once."""
    parameters = dict(model.named_parameters())
    kept = {name for name in model.state_dict() if name not in parameters}
    return {**parameters, **{name: buffer for name, buffer in model.named_buffers() if name in kept}}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _reader(path: Path) -> dcp.HuggingFaceStorageReader:
    return dcp.HuggingFaceStorageReader(str(path))


@contextmanager
def _no_process_group() -> Iterator[None]:
    """DCP says on every call that there is one process; that is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


# ---------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
    world: World | None = None,
) -> Path:
    """Write a checkpoint of ``step`` into the folder of a run, then delete all but the newest ``keep``.

    Args:
        state: what is no tensor, for JSON.
        world: all ranks, which call this together and see the same folder; this process alone if None.

    Raises:
        HLAError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    world = world or World()
    folder = run / CHECKPOINTS
    path = folder / f"step-{step:08d}"
    draft = folder / f".{path.name}"

    def begin() -> None:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".step-*"):  # of a process that was killed while it wrote or deleted
            shutil.rmtree(left)
        draft.mkdir()

    def write() -> None:
        with _no_process_group():
            dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True))

    def finish(facts: Mapping[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, "step": step, **state}, indent=2)
        (draft / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        files = {**facts, STATE_FILE: _facts(draft / STATE_FILE)}
        (draft / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
        for file in [*draft.iterdir(), draft]:
            flush(file)
        if path.exists():  # a damaged one of this step, which the run was resumed before
            _delete(path)
        os.rename(draft, path)
        flush(folder)
        for old in checkpoints(run)[:-keep]:
            _delete(old)

    try:
        world.first(begin)
        world.together(write)
        # The checksums are work for all ranks, too.
        mine = world.together(lambda: {f.name: _facts(f) for f in sorted(draft.iterdir())[world.rank :: world.size]})
        facts = {name: fact for part in world.gather(mine) for name, fact in part.items()}
        world.first(lambda: finish(facts))
    except (OSError, SafetensorError, CheckpointException) as error:
        if world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise HLAError(f"cannot save the checkpoint {str(path)!r}: {_reason(error)}") from error
    return path


def _delete(path: Path) -> None:
    """Delete a checkpoint; a kill in between leaves a folder that is no checkpoint, not half of one."""
    gone = path.with_name(f".{path.name}.deleted")
    os.rename(path, gone)
    shutil.rmtree(gone)


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _reason(error: BaseException) -> str:
    """The cause in a few words; DCP hides it in an exception of its own."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().split("\n")[0]


# ---------------------------------------------------------------------------------------------------- reading


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run, whole or damaged, oldest first."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), key=lambda p: int(p.name[5:]))


def read_state(path: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says, after every file has been held against the manifest.

    Raises:
        HLAError: a file is missing, too many, or not what was written.
    """
    damaged = f"the checkpoint {str(path)!r} is damaged"
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        names = {file.name for file in path.iterdir()} - {MANIFEST_FILE}
        if names != set(manifest):
            raise HLAError(f"{damaged}: {min(names ^ set(manifest))} is missing or does not belong there")
        for name, facts in manifest.items():
            if _facts(path / name) != facts:
                raise HLAError(f"{damaged}: {name} is not what was written")
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        known = state["format"] == FORMAT
    except OSError as error:
        raise HLAError(f"{damaged}: {error.strerror or error} ({Path(error.filename or '').name})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HLAError(f"{damaged}: its {MANIFEST_FILE} or {STATE_FILE} is no such file") from error
    if not known:
        raise HLAError(f"the checkpoint {str(path)!r} was written by another release of this library")
    return state


def newest(run: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None if there is no checkpoint at all.

    Args:
        warn: gets a sentence on each damaged one that is passed over.

    Raises:
        HLAError: there are checkpoints, and all are damaged.
    """
    found = checkpoints(run)
    for path in reversed(found):
        try:
            return path, read_state(path)
        except HLAError as error:
            warn(f"{error}; trying the one before.")
    if found:
        raise HLAError(f"all {len(found)} checkpoints in {str(run / CHECKPOINTS)!r} are damaged")
    return None
