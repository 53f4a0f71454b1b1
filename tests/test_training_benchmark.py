"""benchmarks.training in a tiny setting: rows, their numbers, and what a failing model leaves."""

import csv
import sys

import pytest
import torch

from benchmarks import training
from benchmarks.scale import gpus
from hla.models import SIZES, HLAConfig, count_parameters


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(*options):
        out = tmp_path / "rows.csv"
        common = ["--device", "cpu", "--sizes", "tiny", "--seconds", "0", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["training", *common, *options])
        training.main()
        return list(csv.DictReader(open(out)))

    return call


def test_speed(run, monkeypatch, tmp_path):
    monkeypatch.setitem(training.MICRO, "tiny", 64)  # the longer rows are recomputed, the shorter ones two at a time

    def broken(size):
        raise RuntimeError("no such model")

    monkeypatch.setitem(training.MAKERS, training.LLAMA, broken)
    rows = run("--contexts", "128", "32", "--tokens", "128")
    rows = [r for r in rows if r["model"] not in (training.DELTA, training.GLA)]
    models = ("softmax", "HLA", training.WIDER, "Llama")
    assert [(r["T"], r["model"]) for r in rows] == [(t, m) for t in ("32", "128") for m in models]
    assert {(r["T"], r["batch"], r["micro_batch"], r["recompute"]) for r in rows} == {
        ("32", "4", "2", "0"), ("128", "1", "1", "1"),
    }  # fmt: skip
    for r in rows:
        if r["model"] == "Llama":
            assert "no such model" in r["error"] and r["tokens_per_s"] == r["mfu"] == r["peak_mib"] == ""
            continue
        assert r["error"] == ""
        assert float(r["tokens_per_s"]) == pytest.approx(128e3 / float(r["ms_per_step"]), rel=0.01)
        assert float(r["peak_mib"]) * 2**20 > 12 * int(r["parameters"])
    assert int(rows[1]["parameters"]) == count_parameters(HLAConfig(**SIZES["tiny"]))
    assert (tmp_path / "rows.png").exists()


@pytest.mark.parametrize("size", SIZES)
def test_a_wider_softmax_model_has_as_many_weights(size):
    with torch.device("meta"):
        models = [training.MAKERS[kind](size) for kind in (training.HLA, training.WIDER, training.SOFTMAX)]
    hla, wider, softmax = (sum(p.numel() for p in model.parameters()) for model in models)
    assert abs(wider - hla) < 0.006 * hla and (softmax < 0.96 * hla or size == "tiny")


def test_with_graphs(run, monkeypatch):
    """(Which a CPU does not have: the way there.)"""
    monkeypatch.setitem(training.MICRO, "tiny", 64)
    calls = []
    real = training.Graphed.__call__
    monkeypatch.setattr(training.Graphed, "__call__", lambda self, **x: calls.append(x["ids"].shape) or real(self, **x))
    rows = run("--graphs", "--contexts", "32", "--tokens", "128", "--models", "HLA", "softmax", "Llama")
    assert [(r["model"], r["graphs"], r["error"]) for r in rows] == [(m, "1", "") for m in ("softmax", "HLA", "Llama")]
    assert set(calls) == {(2, 32)} and len(calls) >= 3 * 2 * 3
    for option in ("--compile", "--longest"):
        with pytest.raises(SystemExit, match="2"):
            run("--graphs", option)


def test_graphs_or_not_is_the_same_step():
    numbers = []
    for graphs in (False, True):
        trained = training.Trained(training.HLA, "tiny", "cpu")
        if graphs:
            trained.capture(None)
        ids, targets = training.batch(4, 32, "cpu")
        numbers.append([float(x) for _ in range(2) for x in trained.step(ids, targets, 2)])
        trained.release()
        assert all(p.grad is None for p in trained.model.parameters())
    assert numbers[0] == numbers[1]


def test_longest(run):
    rows = run("--longest", "--contexts", "64", "128", "--piece", "32", "--step-seconds", "1000")
    assert [(r["model"], r["method"], r["T"]) for r in rows] == [
        (model, method, t)
        for model, method in (("HLA", "recompute"), ("HLA", "pieces of 32"), ("softmax", "recompute"))
        for t in ("64", "128")
    ]
    for whole, pieces in zip(rows[:2], rows[2:4], strict=True):
        for name in ("loss", "gradient_norm"):
            assert float(pieces[name]) == pytest.approx(float(whole[name]), rel=1e-4)
    assert float(rows[2]["difference"]) < 1e-5 and rows[3]["difference"] == ""


def test_steps_that_would_take_too_long_are_left_out(run):
    rows = run("--longest", "--contexts", "64", "1024", "--piece", "64", "--step-seconds", "1e-9")
    assert [(r["T"], r["error"][:8]) for r in rows] == [("64", ""), ("128", "left out")] * 3


@pytest.mark.parametrize("module", [training, gpus])
def test_what_cannot_be_measured_is_told_in_a_sentence(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def told(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(tmp_path / "rows.csv"), *options])
        with pytest.raises(SystemExit, match="2"):
            module.main()
        return capsys.readouterr().err.splitlines()[-1]

    if module is training:
        assert "needs a GPU" in told()
    else:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        assert "start it with torchrun" in told("--device", "cpu")
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert "every process needs a GPU; there are 0" in told()
    assert "there are no rows in" in told("--report")


def test_flops():
    """By hand: 6 FLOPs per weight in a linear map, and three times the forward pass of the mixer."""
    trained = training.Trained(training.HLA, "tiny", "cpu")
    linear = 192 * (3 * 192 + 3 * 6 + 2 * 192 + 3 * 512) * 2 + 192 * 32000
    assert training.model_flops(trained, 100) == 6 * linear + 3 * 2 * 6 * (2 * 7 * 32**2)
    softmax = training.Trained(training.SOFTMAX, "tiny", "cpu")
    linear = 192 * (4 * 192 + 3 * 512) * 2 + 192 * 32000
    assert training.model_flops(softmax, 100) == 6 * linear + 3 * 2 * 6 * (2 * 100 * 32)
    before = [p.clone() for p in trained.model.parameters()]
    trained.step(*training.batch(1, 16, "cpu"), 1)
    assert any(not torch.equal(x, p) for x, p in zip(before, trained.model.parameters(), strict=True))
    assert all(p.grad is None for p in trained.model.parameters())
