"""States as files: safetensors with a checksum over every byte and a fingerprint of the model they belong to.

A state means something only to the weights that wrote it, and nothing in its tensors tells: another model of the same
shape would go on from it and write nonsense. So a file says which configuration and which weights made it, and loading
compares both.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hla.errors import HLAError
from hla.models.configuration_hla import HLAConfig

FORMAT_VERSION = 1
DESCRIPTION = "hla_state"  # the metadata entry (JSON) that makes a safetensors file a state
CHECKSUM = b'"sha256":"'
BLANK = b"0" * 64  # what the checksum is while it is computed
# Fields that change nothing about what the numbers of a state mean. All others must agree, those of later versions too.
WITHOUT_MEANING = {
    "bos_token_id", "config_version", "eos_token_id", "initializer_range", "max_position_embeddings", "pad_token_id",
    "tie_word_embeddings", "use_cache",
}  # fmt: skip
WIDTH = 1024


@dataclass(frozen=True)
class Fingerprint:
    """What tells a model from others.

    name: where it was loaded from (the last part, if that was an absolute path), may be empty.
    config: every field of `HLAConfig` that is not inherited, and the configuration version.
    dtype: of the embedding, such as ``"float32"``.
    parameters: how many, without an output head of its own.
    weights: one digest per parameter and buffer of the base model (`HLAModel`), in the order of the modules.
    head: digest of the output head; None if it is tied to the embedding, or was not seen.
    """

    name: str
    config: dict[str, Any]
    dtype: str
    parameters: int
    weights: list[str]
    head: str | None

    def __str__(self) -> str:
        layers, width = self.config["num_hidden_layers"], self.config["hidden_size"]
        about = f"{layers} layers of width {width}, {self.parameters:,} parameters, {self.dtype}"
        return f"{self.name!r} ({about})" if self.name else f"an unnamed model ({about})"


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of an `HLAModel` or `HLAForCausalLM` with its present weights.

    Every weight counts: see `digest`. It takes a fraction of a second per GB of weights on a CPU.
    """
    base = base_of(model)
    tensors = named_tensors(base)
    embedding, head = base.get_input_embeddings().weight, None
    get_output = getattr(model, "get_output_embeddings", None)
    if model is not base and get_output is not None and (output := get_output()) is not None:
        head = None if output.weight is embedding else digest(output.weight)
    name = base.config.name_or_path or ""
    return Fingerprint(
        name=Path(name).name if Path(name).is_absolute() else name,
        config=described(base.config),
        dtype=str(embedding.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in base.parameters()),
        weights=[digest(x) for x in tensors.values()],
        head=head,
    )


def base_of(model: nn.Module) -> Any:
    """The `HLAModel` that a model is or holds (wrappers of compiled, parallel and adapted models hold one).

    Raises:
        HLAError: there is none.
    """
    from hla.models.modeling_hla import HLAModel  # which imports the cache, which imports this file

    for module in model.modules():
        if isinstance(module, HLAModel):
            return module
    raise HLAError(f"a state belongs to an HLA model; {type(model).__name__} is none")


def named_tensors(base: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(base.named_parameters()), **dict(base.named_buffers())}


def described(config: HLAConfig) -> dict[str, Any]:
    """The fields of a configuration that a state file holds."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {x.name: getattr(config, x.name) for x in fields(HLAConfig) if x.name not in inherited}
    return json.loads(json.dumps(own))  # as it comes back from the file: a list where there was a tuple


def digest(x: Tensor) -> str:
    """16 hexadecimal digits that depend on dtype, shape and every bit of a tensor, the same on every device.

    The bits are read as 64-bit words in rows of 1024; hashed are the sums of all rows and of all columns, modulo 2^64.
    Integer sums are exact in any order and run at the speed of the memory, many times faster than a hash of the bytes.
    Whatever changes within one word changes its row's sum. Only changes that cancel in every row and in every column at
    once are missed; training makes none (and a forger is not what this is for).
    """
    with torch.no_grad():
        octets = x.detach().contiguous().flatten().view(torch.uint8)
        size = octets.numel() // 8
        if octets.storage_offset() % 8:
            octets = octets.clone()
        words, rest = octets[: 8 * size].view(torch.int64), octets[8 * size :]
        rows = words[: size // WIDTH * WIDTH].view(-1, WIDTH)
        parts = [rows.sum(1), rows.sum(0), words[rows.numel() :], rest]
        sha = hashlib.sha256(f"{x.dtype} {list(x.shape)}".encode())
        for part in parts:
            sha.update(part.cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def check_model(made_with: Fingerprint, model: Any, what: str) -> None:
    """See that ``model`` is the one that a state was made with.

    Raises:
        HLAError: it is another, saying which both are and where they first differ.
    """
    met = fingerprint(model)
    old, new = made_with.config, met.config
    different = [name for name in new if name not in WITHOUT_MEANING and old[name] != new[name]]
    tied = made_with.head is None or met.head is None or made_with.head == met.head
    if not different and made_with.weights == met.weights and tied:
        return
    if different:
        reason = f"{different[0]} was {old[different[0]]!r} and is {new[different[0]]!r}"
    elif made_with.dtype != met.dtype:
        reason = f"the weights were {made_with.dtype} and are {met.dtype}: load the model with the dtype of the state"
    elif len(made_with.weights) != len(met.weights):
        reason = f"it has {len(met.weights)} weight tensors instead of {len(made_with.weights)}"
    elif made_with.weights != met.weights:
        pairs = zip(named_tensors(base_of(model)), made_with.weights, met.weights, strict=True)
        changed = [name for name, one, other in pairs if one != other]
        reason = f"{len(changed)} of {len(met.weights)} weight tensors differ, the first is {changed[0]}"
    else:
        reason = "its output head differs"
    raise HLAError(f"{what} was made with another model: made with {made_with}, met {met}; {reason}")


def write_state(path: str | Path, tensors: dict[str, Tensor], made_with: Fingerprint, layout: dict[str, Any]) -> None:
    """Write a state in one step: after a crash, or on a full disk, the file is what it was before.

    Raises:
        HLAError: it cannot be written.
    """
    description = {"format_version": FORMAT_VERSION, "made_with": asdict(made_with), **layout}
    metadata = {DESCRIPTION: json.dumps(description, sort_keys=True), "sha256": BLANK.decode()}
    on_cpu = {name: x.detach().to("cpu").contiguous() for name, x in tensors.items()}
    data = bytearray(tensors_to_bytes(on_cpu, metadata))
    at = data.index(CHECKSUM + BLANK) + len(CHECKSUM)
    data[at : at + len(BLANK)] = hashlib.sha256(data).hexdigest().encode()

    target = Path(os.path.realpath(path))
    staging = target.with_name(f".{target.name}.{os.getpid()}.saving")
    try:
        check_writable(path)
        with open(staging, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
        if sys.platform != "win32":  # folders cannot be opened there
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise HLAError(f"cannot save the state to {str(path)!r}: {error.strerror or error}") from error


def check_writable(path: str | Path) -> None:
    """See that a state file can be written there, before the work whose result it is to hold.

    Raises:
        HLAError: it is a folder, or would lie in a folder that is missing or may not be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise HLAError(f"cannot save the state to {str(path)!r}: it is a folder")
    if not target.parent.is_dir():
        raise HLAError(f"cannot save the state to {str(path)!r}: its folder does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise HLAError(f"cannot save the state to {str(path)!r}: its folder may not be written")


def read_state(path: str | Path) -> tuple[dict[str, Tensor], Fingerprint, HLAConfig, dict[str, Any]]:
    """The tensors of a state file (on the CPU), the model it was made with, that model's configuration, the layout.

    Raises:
        HLAError: the file is missing, damaged, none of a state, or of a version that this release does not read.
    """
    name = f"the state file {str(path)!r}"
    try:
        data = bytearray(Path(path).read_bytes())
    except OSError as error:
        raise HLAError(f"cannot read {name}: {error.strerror or error}") from error
    begin = 8 + int.from_bytes(data[:8], "little")
    try:
        if len(data) < begin:
            raise ValueError("shorter than it says")
        metadata = json.loads(data[8:begin]).get("__metadata__") or {}
        description = json.loads(metadata[DESCRIPTION]) if DESCRIPTION in metadata else None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise HLAError(f"{name} is damaged, or no state file at all: it has no readable safetensors header") from error
    if not isinstance(description, dict):
        raise HLAError(f"{name} is damaged, or holds something else: a safetensors file without a state of hla")
    if (version := description.pop("format_version", None)) != FORMAT_VERSION:
        raise HLAError(f"{name} has format version {version}; this release of hla reads version {FORMAT_VERSION}")
    at = data.find(CHECKSUM, 0, begin) + len(CHECKSUM)
    found = bytes(data[at : at + len(BLANK)])
    data[at : at + len(BLANK)] = BLANK
    if at < len(CHECKSUM) or found != hashlib.sha256(data).hexdigest().encode():
        raise HLAError(f"{name} is damaged: its checksum does not match its content")
    try:
        made_with = Fingerprint(**description.pop("made_with"))
        tensors = tensors_from_bytes(bytes(data))
    except (SafetensorError, KeyError, TypeError) as error:
        raise HLAError(f"{name} does not hold what a state file holds: {error}") from error
    try:
        # A state from before a field existed gets the value that a model from then gets.
        config = HLAConfig.from_dict(made_with.config)
    except (ValueError, TypeError) as error:
        raise HLAError(f"{name} was made with a model that this release of hla does not know: {error}") from error
    return tensors, replace(made_with, config=described(config)), config, description
