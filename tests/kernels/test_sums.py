"""Sums over tokens equal those of float64: later and earlier ones, of which a gate has its gradient, and all."""

import pytest
import torch

from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels import segments
from hla.kernels.partial_sums import ROWS, added_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("borders", [True, False])
@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 530])
def test_long_sequences_go_in_parts(length, heads, borders, monkeypatch):
    """Of 8 tokens here; 530 are more parts than are added up at once."""
    monkeypatch.setattr(segments, "ROWS", 8)
    launches = []
    monkeypatch.setattr(segments, "launch", lambda *a, f=segments.launch, **k: (launches.append(a), f(*a, **k)))
    x = torch.randn(2, length, heads, device=DEVICE)
    ends = torch.randn(2, heads, device=DEVICE) if borders else None
    wide = x.double()
    added = 0.0 if ends is None else ends.double()[:, None]
    later = wide.flip(1).cumsum(1).flip(1) + added
    assert_close(segments.sum_later(x, ends, None), later, 1e-6)
    assert_close(segments.minus_earlier(x, ends, None), added - (wide.cumsum(1) - wide), 1e-6)
    assert len(launches) == (2 if length <= 8 else 4)


def test_packed_sequences(monkeypatch):
    monkeypatch.setattr(segments, "ROWS", 8)
    x, ends = torch.randn(1, 40, 6, device=DEVICE), torch.randn(4, 6, device=DEVICE)
    cu = torch.tensor([0, 3, 3, 21, 40], dtype=torch.int32, device=DEVICE)
    later, earlier = segments.sum_later(x, ends, cu), segments.minus_earlier(x, ends, cu)
    for n, (start, stop) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        part, border = x[0, start:stop].double(), ends[n].double()
        if len(part):
            assert_close(later[0, start:stop], part.flip(0).cumsum(0).flip(0) + border, 1e-6)
            assert_close(earlier[0, start:stop], border - (part.cumsum(0) - part), 1e-6)


@pytest.mark.parametrize("rows", [0, 1, ROWS, 2 * ROWS + 5])
@pytest.mark.parametrize("shape", [(3,), (32,), (5, 11)])
def test_what_programs_have_added_up(rows, shape):
    parts = torch.randn(rows, *shape, device=DEVICE)
    total = added_up(parts)
    assert total.shape == shape and total.dtype == torch.float32
    assert_close(total, parts.double().sum(0), 1e-6)
    if rows:
        assert_close(added_up(parts[::2]), parts[::2].double().sum(0), 1e-6)
