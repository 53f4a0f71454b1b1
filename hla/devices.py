"""Which device a command works on; of several processes, each has its own GPU."""

from __future__ import annotations

import os

import torch

from hla.errors import HLAError


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


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in; ``"auto"`` is bfloat16 on a GPU that has it, else float32.

    Raises:
        HLAError: no such dtype.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in ("float32", "bfloat16"):
        raise HLAError(f"dtype must be auto, float32 or bfloat16, not {name!r}")
    return torch.float32 if name == "float32" else torch.bfloat16


def rank_device(name: str, ranks: int) -> torch.device:
    """The device called ``name`` for one of so many processes; of a machine's GPUs each has its own.

    Raises:
        HLAError: see :func:`choose_device`; also where several processes would share one GPU.
    """
    device = choose_device(name)
    if ranks == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise HLAError(f"each rank has a GPU of its own, and {name!r} is one for all: use --device cuda")
    return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
