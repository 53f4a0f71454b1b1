"""One run: build the small model, train it, test it, and return its row."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.arms import ARMS
from benchmarks.quality.mixers import state_numbers
from benchmarks.quality.tasks import Batch, Recall
from benchmarks.quality.text import Text

CURVE = 40  # points of a training curve in a row


Task = Recall | Text
TASKS: dict[str, type[Recall] | type[Text]] = {"mqar": Recall, "text": Text}


@dataclass(frozen=True)
class Entry:
    """One line of the ranking: an arm in one shape."""

    track: str
    arm: str
    heads: int = 1
    head_dim: int = 32
    head_v_dim: int = 32
    hidden_size: int = 64
    layers: int = 2
    task: str = "mqar"

    def job(self, lr: float, seed: int, **sizes: int) -> Job:
        values: dict[str, Any] = vars(self) | sizes
        return Job(lr=lr, seed=seed, **values)


@dataclass(frozen=True, kw_only=True)
class Job(Entry):
    """What defines a run; everything else of its row follows."""

    lr: float
    seed: int
    steps: int = 3000
    tokens_per_step: int = 8192

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class Skeleton(nn.Module):
    """Embedding, layers of norm + mixer with a residual (no MLP), norm, and the embedding again as the output head."""

    def __init__(self, vocabulary: int, hidden_size: int, build_mixer: Callable[[], nn.Module], layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden_size)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size) for _ in range(layers))
        self.mixers = nn.ModuleList(build_mixer() for _ in range(layers))
        self.norm = nn.RMSNorm(hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[asked, vocabulary]`` at ``positions`` of the flattened batch."""
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))[0]
        return F.linear(self.norm(x.flatten(0, 1)[positions]), self.embedding.weight)


def learning_rate(lr: float, steps: int, warmup: float = 0.1) -> Tensor:
    """Linear warm-up, then a cosine to a tenth: one value per step."""
    t = torch.arange(steps, dtype=torch.float64) / steps
    rise = (torch.arange(steps) + 1) / max(1.0, warmup * steps)
    fall = 0.55 + 0.45 * torch.cos(math.pi * ((t - warmup) / (1 - warmup)).clamp(min=0))
    return (lr * torch.minimum(rise, fall)).float()


class Trainer:
    """Trains one model; on a GPU every kind of step is one CUDA graph, captured at its first use."""

    def __init__(self, job: Job, task: Task, device: str):
        self.job = job
        torch.manual_seed(1000 + job.seed)
        arm = ARMS[job.arm]
        build_mixer = lambda: arm.build(job.hidden_size, job.heads, job.head_dim, job.head_v_dim)  # noqa: E731
        self.model = task.build(job, build_mixer).to(device)
        decayed = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        others = [p for p in self.model.parameters() if not any(p is d for d in decayed)]
        self.on_gpu = device == "cuda"
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=self.lr,
            betas=(0.9, 0.98),
            fused=True,
            capturable=self.on_gpu,
        )
        self.rates = learning_rate(job.lr, job.steps).to(device)
        self.losses = torch.zeros(job.steps, device=device)
        self.graphs: dict[int, tuple[Any, Batch, Tensor]] = {}
        self.stream = torch.cuda.Stream() if self.on_gpu else None

    def train(self, batches: Callable[[int], Batch], schedule: list[int]) -> None:
        """``batches(step)`` gives the batch of a step, of the kind that ``schedule`` says."""
        if self.stream is None:
            for step, _ in enumerate(schedule):
                self.lr.copy_(self.rates[step])
                self.losses[step] = self.step(batches(step))
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for step, kind in enumerate(schedule):
                batch = batches(step)
                self.lr.copy_(self.rates[step])
                if kind not in self.graphs:
                    # The first step of a kind runs plainly, which also warms up what a capture must not do.
                    self.losses[step] = self.step(batch)
                    self.graphs[kind] = self.capture(batch)
                    continue
                graph, static, loss = self.graphs[kind]
                for field in ("tokens", "positions", "targets"):
                    getattr(static, field).copy_(getattr(batch, field))
                graph.replay()
                self.losses[step] = loss
        self.stream.synchronize()

    def capture(self, batch: Batch) -> tuple[Any, Batch, Tensor]:
        static = Batch(batch.tokens.clone(), batch.positions.clone(), batch.targets.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            loss = self.step(static)
        return graph, static, loss

    def step(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(self.model(batch.tokens, batch.positions), batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.on_gpu)
        return loss.detach()


def run(job: Job, batches: Callable[[int], Batch], schedule: list[int], task: Task, device: str) -> dict[str, Any]:
    """Trains and tests; the row without the environment's columns."""
    start = time.perf_counter()
    trainer = Trainer(job, task, device)
    trainer.train(batches, schedule)
    seconds = time.perf_counter() - start
    losses = trainer.losses.cpu()
    width = max(1, job.steps // CURVE)
    curve = [float(x.mean()) for x in losses.split(width)]
    learned = next((i * width for i, x in enumerate(curve) if x < 0.5 * task.chance_loss()), None)
    layers: Any = trainer.model.mixers
    return {
        **asdict(job),
        "options": json.dumps(ARMS[job.arm].options | ({"parts": ARMS[job.arm].parts} if ARMS[job.arm].parts else {})),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "mixer_parameters": sum(p.numel() for p in layers.parameters()),
        "state_numbers": state_numbers(layers[0]) or "",
        "finite": bool(losses.isfinite().all()),
        **task.scores(trainer.model, device),
        "plateau_steps": "" if learned is None else learned,
        "curve": " ".join(f"{x:.3f}" for x in curve),
        "seconds": round(seconds, 2),
    }
