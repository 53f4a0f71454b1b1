"""A small language model on the built-in corpus: does what recalls well also predict text well, in equal tokens?"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.tasks import Batch
from hla.data import build_tokenizer, encode_documents, read_documents, split_documents, token_bytes

if TYPE_CHECKING:
    from benchmarks.quality.training import Job

VOCABULARY, CONTEXT = 2048, 512
CACHE = Path("runs/quality/text.npz")


def load_corpus(cache: Path = CACHE) -> dict[str, np.ndarray]:
    """Token ids of the training and held-out documents and bytes per token id; tokenized once, then read from disk."""
    if not cache.exists():
        split = split_documents(read_documents())
        tokenizer = build_tokenizer("bpe", VOCABULARY, split.train)
        arrays: dict[str, Any] = {
            "training": encode_documents(tokenizer, split.train).tokens,
            "held_out": encode_documents(tokenizer, split.held_out).tokens,
            "bytes": np.array([len(b) for b in token_bytes(tokenizer)], np.int64),
        }
        cache.parent.mkdir(parents=True, exist_ok=True)
        draft = cache.with_name(f".{os.getpid()}.npz")
        np.savez(draft, **arrays)
        os.replace(draft, cache)
    with np.load(cache, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


class LanguageModel(nn.Module):
    """`hla.HLAForCausalLM` with the mixers of an arm, as logits at positions of the flattened batch."""

    def __init__(self, job: Job, build_mixer) -> None:
        import hla

        super().__init__()
        config = hla.HLAConfig(
            vocab_size=VOCABULARY,
            hidden_size=job.hidden_size,
            num_hidden_layers=job.layers,
            num_attention_heads=job.heads,
            head_dim=job.head_dim,
        )
        self.model = hla.HLAForCausalLM(config)
        for block in self.model.model.layers:
            scale = block.mixer.o_proj.init_scale
            block.mixer = build_mixer()
            block.mixer.o_proj.init_scale = scale
            for module in block.mixer.modules():
                self.model._init_weights(module)
        self.mixers = nn.ModuleList(block.mixer for block in self.model.model.layers)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden.flatten(0, 1)[positions])


class Text:
    """Next-token prediction in windows of the built-in corpus, tokens in equal number for every mixer."""

    precision = "high"
    columns = ("validation", "test", "bits_per_byte", "nats_repeated", "nats_new", *(f"nats_{i}" for i in range(4)))

    def __init__(self, tokens_per_step: int = 8192):
        self.rows = max(1, tokens_per_step // CONTEXT)
        self.corpus = load_corpus()
        self.ids: Tensor | None = None  # the training text on the device

    def build(self, job: Job, build_mixer) -> nn.Module:
        return LanguageModel(job, build_mixer)

    def schedule(self, steps: int, seed: int) -> list[int]:
        return [CONTEXT] * steps

    def batch(self, kind: int, generator: torch.Generator) -> Batch:
        if self.ids is None or self.ids.device != generator.device:
            self.ids = torch.from_numpy(self.corpus["training"].astype(np.int64)).to(generator.device)
        starts = torch.randint(len(self.ids) - kind - 1, (self.rows,), generator=generator, device=generator.device)
        return self.windows(self.ids, starts, kind)

    def windows(self, ids: Tensor, starts: Tensor, length: int) -> Batch:
        at = starts[:, None] + torch.arange(length + 1, device=ids.device)
        window = ids[at]
        positions = torch.arange(window.shape[0] * length, device=ids.device)
        return Batch(window[:, :-1].contiguous(), positions, window[:, 1:].flatten())

    def chance_loss(self) -> float:
        return math.log(VOCABULARY)

    def held_out(self, device: str) -> Iterator[Batch]:
        """All held-out windows of one context each, in order."""
        ids = torch.from_numpy(self.corpus["held_out"].astype(np.int64)).to(device)
        starts = torch.arange(0, len(ids) - CONTEXT - 1, CONTEXT, device=device)
        for part in starts.split(4 * self.rows):
            yield self.windows(ids, part, CONTEXT)

    @torch.no_grad()
    def scores(self, model: nn.Module, device: str) -> dict[str, float]:
        """Bits per byte; nats per token where the same pair of tokens stood earlier in the window, and elsewhere.

        ``validation`` is the negative loss on every other window, ``test`` on the rest: larger is better, as with
        accuracies. ``nats_0`` .. ``nats_3`` are the loss in the four quarters of the window.
        """
        lengths = torch.from_numpy(self.corpus["bytes"]).to(device)
        sums = torch.zeros(4, 2, 2, device=device, dtype=torch.float64)  # quarter, repeated or not, (nats, tokens)
        halves, total_bytes = torch.zeros(2, 2, device=device, dtype=torch.float64), 0
        row = 0
        for batch in self.held_out(device):
            logits = model(batch.tokens, batch.positions).float()
            nats = nn.functional.cross_entropy(logits, batch.targets, reduction="none").view_as(batch.tokens).double()
            targets = batch.targets.view_as(batch.tokens)
            same = (batch.tokens[:, :, None] == batch.tokens[:, None]) & (targets[:, :, None] == targets[:, None])
            repeated = same.tril(-1).any(-1)
            for quarter, (n, r) in enumerate(zip(nats.chunk(4, 1), repeated.chunk(4, 1), strict=True)):
                for kind in (False, True):
                    sums[quarter, int(kind)] += torch.stack([n[r == kind].sum(), (r == kind).sum()])
            total_bytes += int(lengths[targets].sum())
            for i in range(len(nats)):
                halves[(row + i) % 2] += torch.stack([nats[i].sum(), torch.tensor(float(CONTEXT), device=device)])
            row += len(nats)
        mean = lambda x: round(float(x[0] / x[1]), 4)  # noqa: E731
        return {
            "validation": -mean(halves[0]),
            "test": -mean(halves[1]),
            "bits_per_byte": round(float(sums[..., 0].sum()) / math.log(2) / total_bytes, 4),
            "nats_repeated": mean(sums[:, 1].sum(0)),
            "nats_new": mean(sums[:, 0].sum(0)),
            **{f"nats_{i}": mean(sums[i].sum(0)) for i in range(4)},
        }
