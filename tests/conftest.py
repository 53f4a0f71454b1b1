"""Shared by all tests: uninitialised memory is NaN, so reading it before writing is seen; float64 helpers."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

# The machines of CI have few, shared cores, where threads of small operations wait for each other most of the time.
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests; it must be set before Triton is imported
with torch.device("meta"):  # wakes the meta device, and has it know torch.empty, before that is patched below
    torch.zeros(1)

settings.register_profile(
    "hla", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hla")


@pytest.fixture(autouse=True, scope="session")
def _fill_empty_with_nan():
    """Fresh memory from ``torch.empty`` and friends holds NaN, as it may in the wild."""
    patch = pytest.MonkeyPatch()

    def filled(original):
        def function(*args, **kwargs):
            x = original(*args, **kwargs)
            if x.is_floating_point() and not x.is_meta:
                x.detach().fill_(float("nan"))  # (detached: a leaf that needs a gradient refuses writes)
            return x

        return function

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch.setattr(owner, name, filled(getattr(owner, name)))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _fresh():
    """Every test starts from the same seed, and with no compiled code of another test."""
    torch.manual_seed(0)
    torch.compiler.reset()
