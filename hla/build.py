"""What a training run builds from its configuration: the model, its optimizer, its learning rate.

:func:`check_model` finds what is wrong with the model while nothing has been read yet, and no process waits for others.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hla.errors import HLAError
from hla.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FINAL_LEARNING_RATE = 0.1  # of the peak, at the end of the cosine


def model_settings(config: TrainConfig) -> dict[str, Any]:
    """The HLAConfig fields that ``config`` asks for; those of the tokenizer are missing.

    Raises:
        HLAError: unknown size, kind of layer or option.
    """
    from hla.models import SIZES, HLAConfig

    if config.size not in SIZES:
        raise HLAError(f"unknown size {config.size!r}: choose one of {', '.join(SIZES)}")
    known = {field.name for field in dataclasses.fields(HLAConfig)} - {"vocab_size", "bos_token_id", "eos_token_id"}
    for name in config.model:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ": options are the fields of hla.HLAConfig"
            raise HLAError(f"the model has no option {name!r} to set{hint}")
    settings = {**SIZES[config.size], "max_position_embeddings": config.context, **config.model}
    layers = settings["num_hidden_layers"]
    # What is no number of layers is for HLAConfig to name; the pattern is checked all the same.
    return {"layer_types": layer_types(config.attention, layers if isinstance(layers, int) else 0), **settings}


def check_model(config: TrainConfig, mesh: tuple[int, int, int]) -> None:
    """See that the model can be built, and spread over a mesh (dp, sp, tp), without its weights and without its text.

    Raises:
        HLAError: see :func:`build_model`; also heads or columns of the MLP that cannot be shared out over tp, or
            softmax layers with sp.
    """
    from hla.models import HLAConfig
    from hla.models.modeling_hla import HLABlock

    # Ids are compared with the vocabulary, which is not known before there is a tokenizer.
    settings = {name: value for name, value in model_settings(config).items() if name != "pad_token_id"}
    with _refused("built"), torch.device("meta"):
        model = HLAConfig(**settings)
        if hasattr(model, "validate"):  # what transformers asks for, but only when the model is saved
            model.validate()
        blocks = [HLABlock(model, model.layer_types.index(kind)) for kind in sorted(set(model.layer_types))]
    _, sp, tp = mesh
    if sp > 1 and "full_attention" in model.layer_types:
        raise HLAError(f"the model cannot be spread with --sp {sp}: softmax layers have no sequence parallelism here")
    if tp > 1:
        from hla.distributed.tensor_parallel import check_heads

        with _refused(f"spread with --tp {tp}"):
            check_heads(blocks, tp)


@contextmanager
def _refused(done: str) -> Iterator[None]:
    """Turn what the model says of its arguments into the sentence of a run."""
    from huggingface_hub.errors import StrictDataclassError  # from transformers' own checks, and no ValueError

    try:
        yield
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = (error.__cause__ or error) if isinstance(error, StrictDataclassError) else error
        raise HLAError(f"the model cannot be {done}: {reason}") from error


def layer_types(pattern: str, layers: int) -> list[str]:
    """Spell out a pattern: ``layer_types("hla,softmax", 3)`` is linear, full, linear.

    Raises:
        HLAError: an unknown kind of layer.
    """
    kinds = {"hla": "linear_attention", "softmax": "full_attention"}
    names = [name.strip() for name in pattern.split(",")]
    for name in names:
        if name not in kinds:
            raise HLAError(f"unknown attention {name!r}: choose hla or softmax, or a pattern such as hla,hla,softmax")
    return [kinds[names[i % len(names)]] for i in range(layers)]


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new model of the configured size for this tokenizer, its weights drawn with ``config.seed``; float32, CPU.

    Raises:
        HLAError: see :func:`model_settings`; also a value that means nothing.
    """
    from hla.models import HLAConfig, HLAForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = model_settings(config)
    with _refused("built"):
        torch.manual_seed(config.seed)
        return HLAForCausalLM(HLAConfig(**settings, **ids, vocab_size=len(tokenizer)))


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of the layers, and compute what is in between again in the backward pass."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is random, and a capture cannot ask
    if hasattr(model, "activation_checkpointing_enable"):  # the name in newer releases of transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def build_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on norms, biases, convolutions or per-head numbers."""
    # By the kind of module: the taps of a depthwise convolution are a two-dimensional tensor too, but no matrix.
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"  # (on a CPU it is no faster)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def learning_rate(peak: float, progress: float, step: int, warmup: float) -> float:
    """Linear warm-up times a cosine from ``peak`` to a tenth of it.

    Args:
        progress: how much of the run is over, 0 to 1; by steps or by the clock.
        step: steps done.
        warmup: below 1 a share of the run, from 1 on a number of steps.
    """
    ramp = (step + 1) / warmup if warmup >= 1 else progress / warmup if warmup > 0 else 1.0
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return peak * min(ramp, 1.0) * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)
