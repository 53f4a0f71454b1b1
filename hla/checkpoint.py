"""Model folders: written as a whole or not at all, and loaded with errors a user can read.

A folder holds config.json, model.safetensors, the tokenizer's files and training.json (Hugging Face's layout), beside
what the run keeps there (train.toml, metrics.jsonl, loss.png, tensorboard/, and checkpoints/, to go on from:
:mod:`hla.training_state`).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from hla.errors import HLAError
from hla.train_config import RUN_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TRAINING_FILE = "training.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
# They live in the folder while it is replaced around them. The metrics come last: where they are, the others are.
KEPT = (CHECKPOINTS, RUN_FILE, "loss.png", "tensorboard", METRICS_FILE)


def check_output(folder: Path, overwrite: bool) -> None:
    """See that a run may write to ``folder``, without changing anything in it.

    Raises:
        HLAError: it cannot be written, or holds something else (or an earlier run without ``overwrite``).
    """
    name = repr(str(folder))
    if not (folder / METRICS_FILE).is_file():
        with suppress(OSError):  # what cannot be written is told below
            recover(folder)
    if folder.exists() and not folder.is_dir():
        raise HLAError(f"the output {name} is a file, not a folder")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise HLAError(f"cannot write to the output folder {name}: {str(above)!r} is not a folder that may be written")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / METRICS_FILE).is_file():
            raise HLAError(f"the output folder {name} holds other files; choose a new or empty one")
        if not overwrite:
            raise HLAError(
                f"the output folder {name} holds an earlier run; add --overwrite to replace it or --resume to go on "
                "with it"
            )


def open_output(folder: Path, overwrite: bool, settings: str) -> None:
    """Make ``folder`` ready for a run: new, or emptied of an earlier run if ``overwrite``; with its settings in it.

    Raises:
        HLAError: see :func:`check_output`.
    """
    check_output(folder, overwrite)
    staging = _staging(folder)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        (staging / RUN_FILE).write_text(settings, encoding="utf-8")
        (staging / METRICS_FILE).touch()
        if folder.is_dir():
            shutil.rmtree(folder)
        os.rename(staging, folder)  # with all that says what it is, for a run that is killed now and resumed later
    except OSError as error:
        raise HLAError(f"cannot write to the output folder {str(folder)!r}: {error.strerror or error}") from error


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, training: dict[str, Any]
) -> None:
    """Replace the model in ``folder`` by this one in a single step: after a crash the old or the new one is whole.

    All files are written to a folder beside it and flushed to the disk, then the two folders change names.

    Raises:
        HLAError: the disk is full or the folder not writable; the old model is still in place.
    """
    staging = _staging(folder)
    try:
        recover(folder)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with _quiet():
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        (staging / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
        for path in [*staging.iterdir(), staging]:
            if path.name == "model.safetensors":  # written for its owner alone; let it be as readable as the others
                shutil.copymode(staging / TRAINING_FILE, path)
            flush(path)
        if folder.is_dir():
            _exchange(staging, folder)
            _take_back(staging, folder)
        else:
            os.rename(staging, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise HLAError(f"cannot save the model to {str(folder)!r}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or reports of transformers: a run shows its own bar, and errors are told in one sentence."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _staging(folder: Path) -> Path:
    return folder.absolute().parent / f".{folder.absolute().name}.saving"


def _take_back(old: Path, folder: Path) -> None:
    """Move what lives in ``folder`` there from its predecessor."""
    for name in KEPT:
        if (old / name).exists() and not (folder / name).exists():
            os.rename(old / name, folder / name)


def recover(folder: Path) -> None:
    """Undo what a kill in the middle of :func:`save_model` can leave: logs and checkpoints in the old folder.

    Raises OSError.
    """
    staging = _staging(folder)
    spare = staging.with_suffix(".old")
    if spare.is_dir() and not folder.exists():
        os.rename(spare, folder)
    for old in (staging, spare):
        if old.is_dir() and folder.is_dir():
            _take_back(old, folder)
            shutil.rmtree(old)


def flush(path: Path) -> None:
    """Have a file or folder written to the disk. Raises OSError."""
    if sys.platform == "win32" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Let two folders change names, in one step where the system can (Linux and macOS)."""
    here, there = os.fsencode(first), os.fsencode(second)
    libc: Any = ctypes.CDLL(None) if sys.platform != "win32" else None
    if hasattr(libc, "renameat2"):  # Linux: AT_FDCWD -100, RENAME_EXCHANGE 2
        done = libc.renameat2(-100, here, -100, there, 2) == 0
    elif hasattr(libc, "renamex_np"):  # macOS: RENAME_SWAP 2
        done = libc.renamex_np(here, there, 2) == 0
    else:
        done = False
    if not done:  # a file system that cannot: a crash between these lines leaves the old model under the name .old
        spare = first.with_suffix(".old")
        shutil.rmtree(spare, ignore_errors=True)
        os.rename(second, spare)
        os.rename(first, second)
        os.rename(spare, first)


def load_model(
    folder: str | Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """Load a model folder for inference (evaluation mode).

    Returns:
        (model, tokenizer, what training.json says or {}).

    Raises:
        HLAError: the folder is missing or no model folder, or one of its files is missing or damaged.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    import hla.models  # noqa: F401  registers the model type "hla" with the Auto classes

    folder = Path(folder)
    if not folder.is_dir():
        raise HLAError(f"there is no model folder {str(folder)!r}")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise HLAError(f"{str(folder)!r} is not a model folder: it has no {name}")
    for name in ("config.json", "tokenizer.json", TRAINING_FILE):
        if (folder / name).is_file():
            _read_json(folder / name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise HLAError(f"cannot load the tokenizer of {str(folder)!r}: {_first_line(error)}") from error
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, in one sentence
            )
    except SafetensorError as error:
        raise HLAError(f"{str(folder / 'model.safetensors')!r} is damaged: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise HLAError(f"cannot load the model in {str(folder)!r}: {_first_line(error)}") from error
    model, info = loaded
    wrong = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
    if wrong:
        raise HLAError(f"the weights in {str(folder)!r} do not fit its config.json: {wrong[0]} is missing or misshapen")
    training = _read_json(folder / TRAINING_FILE) if (folder / TRAINING_FILE).is_file() else {}
    return model.to(device or torch.device("cpu")).eval(), tokenizer, training


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise HLAError(f"{str(path)!r} is damaged: it is not JSON ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise HLAError(f"{str(path)!r} is damaged: it does not hold a JSON object")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
