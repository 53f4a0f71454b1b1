"""On a GPU, kernels of an operator are compiled ahead: all of them, each once, and those that are launched then."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CALL = """
import json, sys, torch, triton
import hla
from hla.kernels import ahead

compiled = []


def note(key, fn, is_manual_warmup, **_):
    compiled.append([f"{fn.name} {key}", bool(is_manual_warmup)])


triton.knobs.runtime.jit_post_compile_hook = note
device = torch.device("cuda", torch.cuda.device_count() - 1)  # perhaps not the current one
q, k, v = (torch.randn(1, 200, 2, 64, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
g = (-torch.rand(1, 200, 2, device=device)).requires_grad_()
op = getattr(hla, sys.argv[1])
if sys.argv[2] == "inference first":
    with torch.no_grad():
        op(q, k, v, g=g, backend="triton")
op(q, k, v, g=g, backend="triton")[0].sum().backward()
torch.cuda.synchronize()
print(json.dumps([compiled, len(ahead._coming)]))
"""


@pytest.mark.parametrize("first", ["training", "inference first"])
@pytest.mark.parametrize("op", ["hla_q", "hla2"])
def test_every_kernel_is_compiled_ahead_and_once(op, first, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:hla", "-c", CALL, op, first], capture_output=True, text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compiled, left = json.loads(done.stdout.splitlines()[-1])
    assert len(compiled) > 3 and all(ahead for _, ahead in compiled)
    assert len({what for what, _ in compiled}) == len(compiled)
    assert left == 0
