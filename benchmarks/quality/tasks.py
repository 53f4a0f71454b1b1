"""The tasks: multi-query associative recall (MQAR), as Zoology has it, and small language modelling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.quality.training import Job

VOCABULARY = 8192
# (length, pairs): trained on, and further than trained.
TRAINED = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
LONGER = ((512, 64), (512, 128))


@dataclass(frozen=True)
class Batch:
    """Tokens ``[B, T]``, positions (in the flattened batch) where the model is asked, and what it should answer."""

    tokens: Tensor
    positions: Tensor
    targets: Tensor


def mqar(length: int, pairs: int, examples: int, generator: torch.Generator) -> Batch:
    """Key-value pairs, then queries among random tokens; nearer queries are likelier (Arora et al. 2024, power 0.01).

    Keys come from the first half of the vocabulary, values from the second, without repetition in an example; after a
    queried key stands a random token, not its value.
    """
    if 4 * pairs > length:
        raise ValueError(f"{pairs} pairs and their queries do not fit into {length} tokens")
    device, half = generator.device, VOCABULARY // 2

    def distinct(scores: Tensor) -> Tensor:
        return scores.topk(pairs, dim=-1).indices

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device).clamp(min=1e-20)

    keys = 1 + distinct(uniform(examples, half - 1))
    values = half + distinct(uniform(examples, half))
    space = (length - 2 * pairs) // 2
    log_p = (0.01 - 1) * torch.arange(1, space + 1, device=device).log()
    gaps = distinct(log_p - (-uniform(examples, space).log()).log())  # Gumbel top-k: sampling without replacement
    positions = 2 * pairs + 2 * gaps
    tokens = torch.randint(VOCABULARY, (examples, length), generator=generator, device=device)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens.scatter_(1, positions, keys)
    rows = length * torch.arange(examples, device=device)[:, None]
    return Batch(tokens, (rows + positions).flatten(), values.flatten())


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of several of the same length."""
    length, shift, positions = batches[0].tokens.shape[1], 0, []
    for batch in batches:
        positions.append(batch.positions + shift)
        shift += length * batch.tokens.shape[0]
    return Batch(torch.cat([b.tokens for b in batches]), torch.cat(positions), torch.cat([b.targets for b in batches]))


class Recall:
    """MQAR of mixed lengths: every step has one length and ``tokens_per_step`` tokens; all data are fresh."""

    precision = "highest"
    columns = ("validation", "test", *(f"test_{n}x{p}" for n, p in TRAINED + LONGER))
    # Steps of each length, out of 10, about as Zoology's numbers of examples have it.
    SHARES = ((64, 3), (128, 1), (256, 6))

    def __init__(self, tokens_per_step: int = 8192, validation: int = 128, test: int = 384):
        self.tokens_per_step, self.validation, self.test = tokens_per_step, validation, test

    def build(self, job: Job, build_mixer: Callable[[], nn.Module]) -> nn.Module:
        from benchmarks.quality.training import Skeleton

        return Skeleton(VOCABULARY, job.hidden_size, build_mixer, job.layers)

    @torch.no_grad()
    def scores(self, model: nn.Module, device: str) -> dict[str, float]:
        """Accuracies: their means over the trained and over all settings, and each of the latter."""

        def accuracies(part: str) -> dict[str, float]:
            hits = {
                name: (model(batch.tokens, batch.positions).argmax(-1) == batch.targets).float().mean()
                for name, batch in self.held_out(part, device)
            }
            return {name: round(float(x), 4) for name, x in hits.items()}

        validation, test = accuracies("validation"), accuracies("test")
        return {
            "validation": round(sum(validation.values()) / len(validation), 4),
            "test": round(sum(test.values()) / len(test), 4),
            **{f"test_{name}": x for name, x in test.items()},
        }

    def batch(self, length: int, generator: torch.Generator) -> Batch:
        examples = max(1, self.tokens_per_step // length)
        pairs = [p for n, p in TRAINED if n == length]
        # Examples are shared out evenly.
        counts = [examples // len(pairs) + (i < examples % len(pairs)) for i in range(len(pairs))]
        return concatenate([mqar(length, p, n, generator) for p, n in zip(pairs, counts, strict=True) if n])

    def schedule(self, steps: int, seed: int) -> list[int]:
        """The kind of every step."""
        cycle = [length for length, share in self.SHARES for _ in range(share)]
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < steps:
            order += [cycle[i] for i in torch.randperm(len(cycle), generator=generator).tolist()]
        return order[:steps]

    def held_out(self, part: str, device: str) -> Iterator[tuple[str, Batch]]:
        """Named sets, the same for every run: ``part`` is "validation" (trained lengths) or "test" (longer too)."""
        settings = TRAINED if part == "validation" else TRAINED + LONGER
        generator = torch.Generator(device).manual_seed({"validation": 10_001, "test": 10_002}[part])
        count = self.validation if part == "validation" else self.test
        for length, pairs in settings:
            yield f"{length}x{pairs}", mqar(length, pairs, count, generator)

    def chance_loss(self) -> float:
        return math.log(VOCABULARY // 2)
