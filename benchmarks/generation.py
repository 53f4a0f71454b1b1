"""``python -m benchmarks.generation``: tokens per second of whole models against the length of what they have read.

HLA models of the sizes of `hla.models.SIZES` with random weights, beside Llama models of transformers with the same
width, depth and heads (static cache and SDPA on a GPU, where both are captured in CUDA graphs; the growing cache on a
CPU, where all kinds take turns), and flash-linear-attention's GatedDeltaNet where it imports. Decoding steps are timed
with a context that is already there (random keys and values; an HLA state does not know its length), reading is timed
with a random prompt.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cuda.guard import Budget, free, guarded
from benchmarks.cuda.probes import ceilings, in_graph
from benchmarks.measure import environment, gpu_software, interleaved_medians, peak_bytes, say, synchronize, write_csv
from hla.models import SIZES, HLACache, HLAConfig, HLAForCausalLM
from hla.projection import project

HLA, HLA_COMPILED, SOFTMAX, DELTA = "HLA", "HLA, compiled", "softmax (Llama)", "GatedDeltaNet (fla)"
SOFTMAX_PROJECT = "softmax (Llama), hla.projection"


def new_hla(size: str) -> HLAForCausalLM:
    return HLAForCausalLM(HLAConfig(**SIZES[size]))


def new_softmax(size: str) -> Any:
    """A Llama of the same width, depth, heads and vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=HLAConfig().vocab_size, tie_word_embeddings=True, max_position_embeddings=1 << 20, **SIZES[size]
    )
    return LlamaForCausalLM(config)


class Projected(nn.Module):
    """A linear map that reads its matrix the way HLA does."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return project(self.linear, x)


def new_softmax_project(size: str) -> Any:
    """The Llama with every matrix read by `hla.projection`: what is left of a difference is attention against HLA."""
    model = new_softmax(size)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Projected(child))
    return model


def new_delta(size: str) -> Any:
    """The GatedDeltaNet of flash-linear-attention with the same width, depth and heads.

    Raises:
        ImportError: without the package, or where it does not go with this transformers.
    """
    return _new_fla("GatedDeltaNet", size, head_dim=head_size(size), expand_v=1)


def new_gla(size: str) -> Any:
    """Its GLA, likewise, with keys as wide as values."""
    return _new_fla("GLA", size, expand_k=1, expand_v=1)


def _new_fla(name: str, size: str, **more: Any) -> Any:
    fla = importlib.import_module("fla.models")
    s = SIZES[size]
    config = getattr(fla, f"{name}Config")(
        vocab_size=HLAConfig().vocab_size, hidden_size=s["hidden_size"], num_hidden_layers=s["num_hidden_layers"],
        num_heads=s["num_attention_heads"], intermediate_size=s["intermediate_size"], tie_word_embeddings=True, **more,
    )  # fmt: skip
    return getattr(fla, f"{name}ForCausalLM")(config)


def head_size(size: str) -> int:
    return SIZES[size]["hidden_size"] // SIZES[size]["num_attention_heads"]


class Models:
    """One model of a kind at a time, on the device, in evaluation mode."""

    MAKERS = {HLA: new_hla, SOFTMAX: new_softmax, SOFTMAX_PROJECT: new_softmax_project, DELTA: new_delta}

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def make(self, kind: str, size: str) -> Any:
        torch.manual_seed(0)
        with torch.device(self.device):
            return self.MAKERS[kind](size).to(self.dtype).eval()


def hla_step(model: HLAForCausalLM, batch: int, compiled: bool) -> Callable[[], Tensor]:
    """A decoding step in place."""
    cache = HLACache(model.config)
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
    call: Any = torch.compile(model, fullgraph=True) if compiled else model
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # allocates the states
    return lambda: call(input_ids=ids, past_key_values=cache, use_cache=True).logits


def softmax_step(model: Any, batch: int, context: int) -> Callable[[], Tensor]:
    """A decoding step after ``context`` tokens, again and again at the same place."""
    from transformers.cache_utils import DynamicCache, StaticCache

    ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
    if model.device.type == "cpu":
        cache: Any = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys, layer.values = (
                torch.randn(*x.shape[:2], context, x.shape[3], dtype=x.dtype) for x in (layer.keys, layer.values)
            )

        def grow() -> Tensor:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]
            return logits

        return grow
    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.normal_(), layer.values.normal_()
        layer.cumulative_length.fill_(context)

    def step() -> Tensor:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        return logits

    return step


def delta_step(model: Any, batch: int) -> Callable[[], Tensor]:
    """A decoding step with the cache the model makes for itself (never captured: its cache changes its tensors)."""
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
    held = [model(input_ids=ids, use_cache=True).past_key_values]

    def step() -> Tensor:
        out = model(input_ids=ids, past_key_values=held[0], use_cache=True)
        held[0] = out.past_key_values
        return out.logits

    return step


def decoding_in_turns(args: argparse.Namespace, models: Models, size: str) -> list[dict]:
    """Rows of a size on a CPU, whose other work must hit all kinds alike: they take turns, token by token."""
    kinds = [HLA] if args.alone else [HLA, SOFTMAX, SOFTMAX_PROJECT]
    made = {kind: models.make(kind, size) for kind in kinds}
    rows = []
    for batch in args.batches:
        for context in args.contexts:
            runs: dict[str, Callable[[], object]] = {
                kind: hla_step(model, batch, False) if kind == HLA else softmax_step(model, batch, context)
                for kind, model in made.items()
            }
            for kind, ms in interleaved_medians(runs, args.device, args.seconds).items():
                say(f"{size} {kind}, batch {batch}, context {context}: {ms:.3f} ms")
                rows.append(decoding_row(size, kind, batch, context, ms))
    return rows


def decoding_row(
    size: str, kind: str, batch: int, context: int, ms: float | None, floor: float | None = None,
    memory: float | None = None, error: str = "",
) -> dict[str, Any]:  # fmt: skip
    return {
        "what": "decode", "size": size, "model": kind, "batch": batch, "context": context,
        "ms": "" if ms is None else round(ms, 4),
        "tokens_per_s": "" if ms is None else round(1e3 * batch / ms, 1),
        "of_weights_floor": "" if ms is None or not floor else round(ms / floor, 2),
        "cache_mib": "" if memory is None else round(memory, 1),
        "error": error,
    }  # fmt: skip


def decoding(args: argparse.Namespace, models: Models, size: str, bandwidth: float, budget: Budget) -> list[dict]:
    """Rows of a size on a GPU: every batch, context and kind."""
    rows: list[dict[str, Any]] = []
    asked = {HLA: True, HLA_COMPILED: args.compile, SOFTMAX: not args.alone, DELTA: args.fla}
    kinds = [kind for kind, wanted in asked.items() if wanted]
    results: dict[tuple[str, int, int], tuple[float | None, float | None, str]] = {}
    floors: dict[str, float] = {}
    for kind in kinds:
        model, error = guarded(models.make, HLA if kind == HLA_COMPILED else kind, size, budget=budget)
        if model is None:
            results |= {(kind, b, c): (None, None, error) for b in args.batches for c in args.contexts}
            continue
        floors[kind] = 1e3 * sum(p.numel() * p.element_size() for p in model.parameters()) / bandwidth
        for batch in args.batches:
            if kind == HLA_COMPILED and batch > 1:
                continue
            run, memory = None, None
            for context in args.contexts:
                if kind == SOFTMAX or run is None:
                    run = None
                    free()
                    before = torch.cuda.memory_allocated()

                    def prepare(kind=kind, model=model, batch=batch, context=context) -> Callable[[], object]:
                        if kind == SOFTMAX:
                            step = softmax_step(model, batch, context)
                        elif kind == DELTA:
                            return delta_step(model, batch)
                        else:
                            step = hla_step(model, batch, kind == HLA_COMPILED)
                        return in_graph([step], args.device)

                    run, error = guarded(prepare, budget=budget)
                    memory = (torch.cuda.memory_allocated() - before) / 2**20
                times, failed = None, error
                if run is not None:
                    times, failed = guarded(interleaved_medians, {kind: run}, args.device, args.seconds, budget=budget)
                ms = None if times is None else times[kind]
                results[kind, batch, context] = ms, memory if ms else None, failed
                say(f"{size} {kind}, batch {batch}, context {context}: " + (f"{ms:.3f} ms" if ms else failed))
            run = None
        del model
        gc.collect()
        free()
    for (kind, batch, context), (ms, memory, error) in results.items():
        rows.append(decoding_row(size, kind, batch, context, ms, floors.get(kind), memory, error))
    return rows


def reading(args: argparse.Namespace, models: Models, size: str, budget: Budget) -> list[dict]:
    """Rows of a size: milliseconds for a whole prompt, with its cache."""
    rows = []
    for length in args.prompts:
        for kind in (HLA, *([] if args.alone else [SOFTMAX])):
            model, error = guarded(models.make, kind, size, budget=budget)
            ms = memory = None
            if model is not None:
                ids = torch.randint(model.config.vocab_size, (1, length), device=args.device)

                def read(model=model, ids=ids) -> object:
                    return model(input_ids=ids, use_cache=True, logits_to_keep=1)

                times, error = guarded(interleaved_medians, {kind: read}, args.device, args.seconds, budget=budget)
                if times is not None:
                    ms, memory = times[kind], peak_bytes(read, args.device)
            say(f"{size} {kind}, prompt of {length}: " + (f"{ms:.2f} ms" if ms else error))
            rows.append(
                {
                    "what": "prefill", "size": size, "model": kind, "batch": 1, "context": length,
                    "ms": "" if ms is None else round(ms, 3),
                    "tokens_per_s": "" if ms is None else round(1e3 * length / ms),
                    "of_weights_floor": "",
                    "cache_mib": "" if memory is None else round(memory / 2**20, 1),
                    "error": error,
                }
            )  # fmt: skip
            del model
            free()
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Decoding speed against context, a panel per batch and a colour per size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["what"] == "decode" and r["tokens_per_s"] != ""]
    batches = sorted({r["batch"] for r in rows})
    sizes = [s for s in SIZES if any(r["size"] == s for r in rows)]
    styles = {HLA: "o-", HLA_COMPILED: "^-.", SOFTMAX: "s--", SOFTMAX_PROJECT: "d:", DELTA: "x:"}
    figure, axes = plt.subplots(1, len(batches), figsize=(1 + 4.2 * len(batches), 4.2), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for i, size in enumerate(sizes):
            for kind, style in styles.items():
                found = [r for r in rows if (r["batch"], r["size"], r["model"]) == (batch, size, kind)]
                if found:
                    axis.plot(
                        [r["context"] for r in found], [r["tokens_per_s"] for r in found], style, color=f"C{i}",
                        label=f"{size}, {kind}", markersize=4, lw=1.2,
                    )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", title=f"batch {batch}")
        axis.grid(alpha=0.3, which="both", lw=0.5)
    axes[0][0].set_ylabel("new tokens per second")
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.suptitle(rows[0]["device"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["base"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="lengths of prompts whose reading is timed")
    parser.add_argument("--compile", action="store_true", help="on a GPU, also HLA through torch.compile, at batch 1")
    parser.add_argument("--alone", action="store_true", help="without the softmax model")
    parser.add_argument("--fla", action="store_true", help="on a GPU, also flash-linear-attention's GatedDeltaNet")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring per row")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which nothing new starts")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/generation_DEVICE.csv")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    out = args.out or Path(f"benchmarks/results/generation_{args.device}.csv")
    where = environment(args.device) | (gpu_software() if args.device == "cuda" else {})
    budget = Budget(args.budget)
    models = Models(args.device, dtype)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        bandwidth = ceilings(args.device, 0.1).bandwidth if args.device == "cuda" else 1.0
        for size in args.sizes:
            if args.device == "cpu":
                rows += decoding_in_turns(args, models, size)
            else:
                rows += decoding(args, models, size, bandwidth, budget)
            rows += reading(args, models, size, budget)
            synchronize(args.device)
            write_csv(out, [{**r, "dtype": str(dtype).removeprefix("torch."), **where} for r in rows])
    plot([{**r, **where} for r in rows], out.with_suffix(".png"))
    say(f"wrote {out} and its plot")


if __name__ == "__main__":
    main()
