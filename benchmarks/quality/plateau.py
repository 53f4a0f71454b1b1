"""Why some operators stay on a plateau of recall (loss at chance) for long: measurements on a CPU, in 15 to 20 minutes.

At the start of training, on MQAR with the sizes of `benchmarks.quality`:

- spectrum: of ``S_t = sum_{j<=t} k_j k_j^T`` (largest eigenvalue over trace, effective rank ``exp(entropy)``, condition
  number of ``S_t + I``), so whether one direction dominates the features;
- growth: of the transformed keys, inner values or queries, and of the output before its norm, with the position;
- reading: the explicit weights ``w_tj`` of the values at the positions asked, the weight of the position that answers
  against the others. "start": with the layer's own q and k. "same token": with q = k = features f of the token alone,
  as if the projections had learned to match. "previous token": q = f(token), k = f(token before), as recall needs it
  (the answer stands one after the key). So what the operator itself does to a perfect match is left;
- gradient: norms over the parameters' norms.

In training, on a small MQAR (vocabulary 128, 8 pairs in 64 tokens, two layers, one head of 16):

- plateau: first step whose loss (mean of 25 steps) is below 0.9 and 0.5 of chance; empty if never;
- reading, small: signal to noise as above, before the first step;
- gradient, small: at step 150, the cosine between the mean gradients of 32 batches and of 32 others: how much of the
  gradient is signal;
- trained spectrum: largest eigenvalue over trace of S_T, every 100 steps.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import environment, say, write_csv
from benchmarks.quality import tasks
from benchmarks.quality.arms import ARMS, PLAIN, ZERO_MEAN, public
from benchmarks.quality.mixers import MomentPolynomial, NormalisedKeys, iterate, read, running_weight
from benchmarks.quality.plateau_plot import plot
from benchmarks.quality.training import Job, Skeleton, Trainer, learning_rate

RESULTS = Path("benchmarks/results/quality_plateau.csv")
LENGTH, PAIRS, EXAMPLES, DIM = 256, 16, 32, 32
COUNTED, UNIT = "hla2, p=k, k~/count, identity", "hla2, p=k, |k~|=1"
MEASURED = (
    "linear",
    "hla2",
    "hla2, p=q, residual",
    "hla2, p=k",
    COUNTED,
    UNIT,
    "ahla",
    "hla3",
    "protecting",
    "query 4",
)
PURE_ZERO_MEAN = {
    "hla2, identity": public("hla2", p="q", **PLAIN, **ZERO_MEAN),
    "hla2, p=k, identity": public("hla2", p="k", **PLAIN, **ZERO_MEAN),
}
FEATURES = ("silu", "identity")
SMALL_VOCABULARY, SMALL_LENGTH, SMALL_PAIRS, SMALL_BATCH, WINDOW = 128, 64, 8, 32, 25


def row(measurement: str, arm: str, features: str, parameter: str, position: object, value: object) -> dict[str, Any]:
    value = f"{value:.5g}" if isinstance(value, float) else value
    names = ("measurement", "arm", "features", "parameter", "position", "value")
    return dict(zip(names, (measurement, arm, features, parameter, position, value), strict=True))


def model_of(arm: str, features: str, layers: int, seed: int = 0) -> Skeleton:
    torch.manual_seed(1000 + seed)
    chosen = replace(ARMS[arm], options=ARMS[arm].options | {"feature_map": features})
    return Skeleton(tasks.VOCABULARY, 64, lambda: chosen.build(64, 1, DIM, DIM), layers)


@dataclass
class Inputs:
    """What one layer's operator reads, ``[B, T, 1, D]``, and its options (inner query, coefficients)."""

    layer: Any
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def operate(self, v: Tensor) -> Tensor:
        return self.layer._operate(self.q, self.k, v, dict(self.options), None, False, None, None)[0]

    def transformed(self) -> tuple[str, Tensor]:
        """The key (order 2 and 3), inner value (ahla) or query (query 4) that the last reading uses, ``[B, 1, T, D]``.

        Without one (linear): the plain key.
        """
        layer, (q, k, v) = self.layer, (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        decay = torch.ones(k.shape[-2], k.shape[-2]).tril()
        if isinstance(layer, MomentPolynomial):
            b = torch.sigmoid(self.options["b_proj"].transpose(1, 2)[..., None])
            ridge = layer.log_lambda.exp()[:, None, None].expand_as(b)
            theta = layer.thetas("query", ridge, running_weight(k, b, decay), 0.0)
            return "q~", iterate(q, k, b * k, ridge, decay, theta)
        if isinstance(layer, NormalisedKeys):
            keys = read(k, k, k, decay)
            norm = (
                keys.norm(dim=-1, keepdim=True)
                if layer.norm == "l2"
                else running_weight(k, torch.ones_like(k[..., :1]), decay)
            )
            return "k~", keys / norm
        if layer.op == "linear_attn":
            return "k", k
        p = q if self.options["p"] == "q" else k
        gain, ridge = (
            x.transpose(1, 2)[..., None] if isinstance(x, Tensor) else x
            for x in (self.options["gain"], self.options["ridge"])
        )
        what, x, own = ("v~", v, v) if layer.op == "ahla" else ("k~", k, p)
        return what, gain * layer.scale * read(p, k, x, decay) + ridge * own


MODES = ("start", "same token", "previous token")


def inputs_of(layer: Any, x: Tensor, mode: str = "start") -> Inputs:
    """``mode``: "start", as the layer has it, or the features f of `at_start` that match perfectly."""
    q, k, v, p, _ = layer._project(x, None, None, None, None, False)
    if mode != "start":
        one = layer.qkv_proj(x)[..., layer.split_sizes[0] : sum(layer.split_sizes[:2])].unflatten(-1, (1, -1))
        q = k = layer._normalised(F.silu(one) if layer.feature_map == "silu" else one)
        if mode == "previous token":
            k = k.roll(1, dims=1)
    options = {"g": None, **layer._coefficients(x, k)} | ({} if p is None else {"p": p})
    return Inputs(layer, q, k, v, options)


def spectrum(k: Tensor) -> dict[str, Tensor]:
    """``k [B, T, D]``: numbers of the eigenvalues of S_t, ``[B, T]``."""
    values = torch.linalg.eigvalsh((k[..., :, None] * k[..., None, :]).cumsum(1).double()).clamp(min=1e-12)
    share = values / values.sum(-1, keepdim=True)
    return {
        "top share": share[..., -1],
        "effective rank": (-share * share.log()).sum(-1).exp(),
        "condition": (values[..., -1] + 1) / (values[..., 0] + 1),
    }


def exponent(positions: Tensor, values: Tensor) -> float:
    """Slope of ``log values`` over ``log positions`` from position 16 on."""
    kept = positions >= 16
    x, y = positions[kept].double().log(), values[kept].double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@torch.no_grad()
def reading(layer: Any, x: Tensor, batch: tasks.Batch, mode: str) -> dict[str, float]:
    """The weight of the position that answers, in the rows asked, against all others before them."""
    examples, length = batch.tokens.shape
    eye = torch.eye(length)[:, None].expand(examples, length, 1, length)
    inputs = inputs_of(layer, x, mode)
    found = contrast(inputs.operate(eye)[:, :, 0], batch, mode)
    if getattr(layer, "op", "") == "hla3":
        # tril(W W^T) W, its diagonal apart: there the inner value is what first-order attention reads at t.
        w = (inputs.q[:, :, 0] @ inputs.k[:, :, 0].mT).tril()
        outer = (w @ w.mT).tril()
        found |= {
            f"{n}, own position alone": y for n, y in contrast(outer * torch.eye(length) @ w, batch, mode).items()
        }
        found |= {f"{n}, others alone": y for n, y in contrast(outer.tril(-1) @ w, batch, mode).items()}
    return found


def contrast(weights: Tensor, batch: tasks.Batch, mode: str) -> dict[str, float]:
    examples, length = batch.tokens.shape
    asked = batch.positions % length
    w = weights[batch.positions // length, asked].abs()
    w.scatter_(1, asked[:, None], 0.0)  # the position itself is known anyway
    pairs = len(batch.positions) // examples
    answer = 2 * torch.arange(pairs).repeat(examples)[:, None] + (mode == "previous token")
    hit, others = w.gather(1, answer)[:, 0], w.scatter(1, answer, 0.0)
    return {
        "share": float((hit / w.sum(-1)).mean()),
        "times the others' mean": float((hit * (asked - 1) / others.sum(-1)).median()),
        "signal to noise": float((hit / others.square().sum(-1).sqrt()).median()),
    }


@torch.no_grad()
def at_start() -> Iterator[dict[str, Any]]:
    batch = tasks.mqar(LENGTH, PAIRS, EXAMPLES, torch.Generator().manual_seed(1))
    t = torch.arange(1, LENGTH + 1)
    shown = [s for s in (4, 8, 16, 32, 64, 128, 256)]
    for features, arm in itertools.product(FEATURES, MEASURED):
        if arm == COUNTED and features == "silu":
            continue
        model = model_of(arm, features, layers=1)
        layer, x = model.mixers[0], model.norms[0](model.embedding(batch.tokens))
        inputs = inputs_of(layer, x)
        if arm == "linear":
            for mode in MODES[:2]:
                for name, values in spectrum(inputs_of(layer, x, mode).k[:, :, 0]).items():
                    for s in shown:
                        yield row("spectrum", mode, features, name, s, float(values[:, s - 1].mean()))
        what, inner = inputs.transformed()
        for name, y in ((what, inner.transpose(1, 2)), ("o", inputs.operate(inputs.v))):
            norms = y.norm(dim=-1).mean(dim=(0, 2))
            for s in shown:
                yield row("growth", arm, features, name, s, float(norms[s - 1]))
            yield row("growth", arm, features, f"exponent of {name}", "", exponent(t, norms))
        for mode in MODES:
            for name, number in reading(layer, x, batch, mode).items():
                yield row("reading", arm, features, f"{name}, {mode}", "", number)
        say(f"start: {arm}, {features}")


def projections(model: Any, batches: list[tasks.Batch]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, mean gradient over the batches, and weight of each layer's projections to q, k and v."""
    weights = [layer.qkv_proj.weight for layer in model.mixers]
    losses = (F.cross_entropy(model(b.tokens, b.positions), b.targets) for b in batches)
    sums = [sum(gs) / len(batches) for gs in zip(*(torch.autograd.grad(x, weights) for x in losses), strict=True)]
    return [
        (f"{name}, layer {i + 1}", grad.flatten(), part.detach().flatten())
        for i, (layer, gradient) in enumerate(zip(model.mixers, sums, strict=True))
        for name, grad, part in zip(
            "qkv", gradient.split(layer.split_sizes), layer.qkv_proj.weight.split(layer.split_sizes), strict=False
        )
    ]


def gradients(batches: int = 4) -> Iterator[dict[str, Any]]:
    """Two layers, the loss of MQAR: norm of the mean gradient over the norm of the weight."""
    generator = torch.Generator().manual_seed(2)
    data = [tasks.mqar(LENGTH, PAIRS, EXAMPLES, generator) for _ in range(batches)]
    for features, arm in itertools.product(FEATURES, MEASURED):
        if arm == COUNTED and features == "silu":
            continue
        model = model_of(arm, features, layers=2)
        for name, grad, weight in projections(model, data):
            yield row("gradient", arm, features, f"{name}: norm", "", float(grad.norm() / weight.norm()))
        say(f"gradients: {arm}, {features}")


@dataclass(frozen=True)
class Run:
    """A small training run: the arm and what is unlike the others. ``start``: log of the second-order term's size."""

    arm: str
    lr: float = 3e-3
    warmup: float = 0.1
    start: float | None = None
    seed: int = 0

    def parameter(self) -> str:
        start = "" if self.start is None else f" start e^{self.start:g}"
        return f"lr {self.lr:g} warmup {self.warmup:g} seed {self.seed}{start}"


PURE_OR_NOT = ("hla2", "hla2, p=k", "protecting")
# Plateaus differ much between seeds: every setting has two, the default setting three.
RUNS = [
    *(Run(arm, seed=seed) for seed in range(3) for arm in MEASURED),
    *(Run(arm, lr=lr, seed=seed) for seed in range(2) for arm in PURE_OR_NOT for lr in (1e-3, 1e-2)),
    *(Run("protecting", start=start, seed=seed) for seed in range(2) for start in (-5.0, -1.0, 0.0)),
    *(Run("hla2, p=k, residual", start=start, seed=seed) for seed in range(2) for start in (-3.0, 0.0)),
    *(Run(arm, warmup=w, seed=seed) for seed in range(2) for arm in PURE_OR_NOT[1:] for w in (0.02, 0.3)),
    *(Run(arm, seed=seed) for seed in range(2) for arm in PURE_ZERO_MEAN),
]


def small_batches(seed: int) -> Iterator[tasks.Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield tasks.mqar(SMALL_LENGTH, SMALL_PAIRS, SMALL_BATCH, generator)


def train(run: Run, steps: int) -> tuple[Tensor, list[tuple[str, str, object, float]]]:
    """Losses up to the end of the plateau, and (measurement, parameter, step, value) along the way."""
    job = Job(
        track="plateau", arm=run.arm, lr=run.lr, seed=run.seed, head_dim=16, head_v_dim=16, hidden_size=32, steps=steps
    )
    trainer = Trainer(job, tasks.Recall(), "cpu")
    rates = learning_rate(run.lr, steps, run.warmup)
    model: Any = trainer.model
    if run.start is not None:
        for layer in model.mixers:
            name, value = ("log_b", run.start) if run.arm == "protecting" else ("gain_head", math.exp(run.start))
            getattr(layer, name).data.fill_(value)
    seen: list[Tensor] = []
    for layer in model.mixers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    losses: list[float] = []
    notes: list[tuple[str, str, object, float]] = []
    for step, batch in zip(range(steps), small_batches(run.seed), strict=False):
        if step == 0:
            x = model.norms[1](model.embedding(batch.tokens))
            for mode in MODES[1:]:
                number = reading(model.mixers[1], x, batch, mode)["signal to noise"]
                notes.append(("reading, small", f"signal to noise, {mode}", step, number))
        if step == 150:
            halves = [projections(model, [next(other) for _ in range(32)]) for other in map(small_batches, (900, 901))]
            for (name, one, _), (_, two, _) in zip(*halves, strict=True):
                cosine = float(F.cosine_similarity(one, two, dim=0))
                notes.append(("gradient, small", f"agreement of {name}", step, cosine))
        seen.clear()
        trainer.lr.copy_(rates[step])
        losses.append(float(trainer.step(batch)))
        if step % 100 == 0:
            for i, (layer, x) in enumerate(zip(model.mixers, seen, strict=True)):
                with torch.no_grad():
                    top = spectrum(inputs_of(layer, x).k[:, :, 0])["top share"][:, -1].mean()
                notes.append(("trained spectrum", f"layer {i + 1}", step, float(top)))
        if len(losses) >= WINDOW and sum(losses[-WINDOW:]) < WINDOW * 0.5 * math.log(SMALL_VOCABULARY // 2):
            break
    return torch.tensor(losses), notes


def training(steps: int) -> Iterator[dict[str, Any]]:
    chance = math.log(SMALL_VOCABULARY // 2)
    for run in RUNS:
        begun = time.perf_counter()
        with mock.patch.object(tasks, "VOCABULARY", SMALL_VOCABULARY), mock.patch.dict(ARMS, PURE_ZERO_MEAN):
            losses, notes = train(run, steps)
            features = ARMS[run.arm].options.get("feature_map", "silu")
        smooth = losses.unfold(0, WINDOW, 1).mean(-1)
        report: list[int | str] = []
        for part in (0.9, 0.5):
            below = (smooth < part * chance).nonzero()
            first = int(below[0]) + WINDOW if len(below) else ""
            report.append(first)
            yield row("plateau", run.arm, features, f"{run.parameter()}: below {part} of chance", "", first)
        yield row("plateau", run.arm, features, f"{run.parameter()}: last loss", len(losses), float(smooth[-1]))
        for measurement, parameter, step, value in notes:
            yield row(measurement, run.arm, features, f"{run.parameter()}: {parameter}", step, value)
        for i in range(0, len(losses) - WINDOW + 1, WINDOW):
            value = float(losses[i : i + WINDOW].mean())
            yield row("loss", run.arm, features, run.parameter(), i + WINDOW, value)
        say(f"{run.arm}, {run.parameter()}: {report}, loss {smooth[-1]:.3f}, {time.perf_counter() - begun:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.plateau", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="of every small training run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = environment("cpu")
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        for new in PARTS[part](args.steps):
            rows.append(new | where)
            if new["measurement"] == "plateau":
                write_csv(args.out, rows)
    write_csv(args.out, rows)
    plot(args.out, args.out.with_suffix(".png"))
    say(f"wrote {args.out} and {args.out.with_suffix('.png')}")


PARTS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "start": lambda steps: at_start(),
    "gradients": lambda steps: gradients(),
    "training": training,
}


if __name__ == "__main__":
    main()
