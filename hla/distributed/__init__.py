"""One model on many devices: a sequence spread over ranks, and FSDP2 and tensor parallelism around it.

`SequenceParallel` is the whole interface of sequence parallelism, one all-gather per operator: `SequenceParallel.run`
for operators, the attribute ``sequence_parallel`` of a layer, `set_sequence_parallel` of a model; `shard_sequence` cuts
a batch. `parallelize_hla` spreads a language model over a mesh of data, sequence and tensor parallelism;
`clip_grad_norm` and `full_state_dict` go with it. See docs/distributed.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hla.distributed.batch import shard_sequence
from hla.distributed.sequence import Pending, SequenceParallel

if TYPE_CHECKING:
    from hla.distributed.parallelize import clip_grad_norm, full_state_dict, parallelize_hla

__all__ = [
    "Pending",
    "SequenceParallel",
    "clip_grad_norm",
    "full_state_dict",
    "parallelize_hla",
    "shard_sequence",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # what needs the models, and so transformers, is loaded when it is touched
        return getattr(import_module("hla.distributed.parallelize"), name)
    raise AttributeError(f"module 'hla.distributed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
