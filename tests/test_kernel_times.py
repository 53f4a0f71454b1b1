"""`benchmarks.cuda.kernels` without a GPU: what it lists and writes, and what it refuses."""

import csv
import sys

import pytest
import torch

from benchmarks.cuda import kernels


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["kernels", *map(str, args)])
    kernels.main()


def test_rows_are_by_operator_and_shape_the_longest_first(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "times.csv"
    monkeypatch.setattr(kernels, "PASSES", 2)
    shapes = ("1x32x1x16", "2x16x1x16")
    run(monkeypatch, *shapes, "--operators", "linear_attn", "hla2", "--device", "cpu", "--least", "0", "--out", out)
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["operator"], row["shape"]), []).append(float(row["microseconds"]))
        assert row["commit"] and row["torch"] == torch.__version__ and float(row["calls"]) > 0
    assert set(groups) == {(name, shape) for name in ("linear_attn", "hla2") for shape in shapes}
    assert all(times == sorted(times, reverse=True) and times[0] > 0 for times in groups.values())
    assert "hla2, 2x16x1x16" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "1x32x1x16")
    assert "there is no GPU; --device cpu" in capsys.readouterr().err
