"""Compiles for a GPU that is not there the kernels a function would launch, and reads what they need of it.

`record` runs a function on CPU tensors with every launch replaced by a note of it; `compiled` turns such a note into
machine code for one compute capability with the assembler that comes with Triton, whose report has the registers and
the spilled bytes. Not in the interpreter: TRITON_INTERPRET must not be set in the process.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from hla.kernels import ahead

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict
    options: dict


class Needs(NamedTuple):
    """Registers per thread, bytes spilled per thread (stores), bytes of shared memory per block."""

    name: str
    registers: int
    spilled: int
    shared: int


def record(function: Callable[[], object], foreseen: list[Launch] | None = None) -> list[Launch]:
    """The launches a function makes. To foreseen, if it is given, come those that `hla.kernels.ahead` compiles."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False)) | {n: x for n, x in kwargs.items() if n in names}
        launch = Launch(self, arguments, {n: x for n, x in kwargs.items() if n not in names})
        (foreseen if warmup else launches).append(launch)

    patches = [
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(ahead, "ThreadPoolExecutor", _AtOnce),
        mock.patch.dict(ahead._coming, clear=True),
    ]
    if foreseen is None:
        patches.append(mock.patch.object(ahead, "_rehearse"))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        function()
    return launches


class _AtOnce:
    """An executor without threads."""

    def __init__(self, *_):
        pass

    def submit(self, function: Callable[[], object]) -> Future:
        future: Future = Future()
        future.set_result(function())
        return future

    def shutdown(self, wait: bool) -> None:
        pass


def compiled(launch: Launch, capability: int) -> Needs:
    """What the kernel of a launch needs on a device of this compute capability (90, 80, ...)."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    report = _assembler_report(binary.asm["ptx"], capability)
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill stores", report))
    return Needs(launch.kernel.__name__, registers, spilled, binary.metadata.shared)


def _assembler_report(ptx: str, capability: int) -> str:
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = f"sm_{capability}{'a' if capability == 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run(
            [ptxas, "-v", f"-arch={arch}", path, "-o", Path(folder) / "kernel.cubin"], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr
