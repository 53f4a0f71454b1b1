"""HLA: Higher-order Linear Attention (Zhang, Qin, Wang, Gu, arXiv 2510.27258) in PyTorch.

Importing this package needs neither Triton nor a GPU; the models (and transformers with them) load when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hla.ops import published, reference
from hla.ops.higher_order import ahla, hla2, hla3, hla_n, hla_q, linear_attn
from hla.ops.recurrent import step

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention
    from hla.models import HLAConfig, HLAForCausalLM, HLAModel

__version__ = "0.1.0"
__all__ = [
    "HLAConfig",
    "HLAForCausalLM",
    "HLAModel",
    "HigherOrderLinearAttention",
    "ahla",
    "hla2",
    "hla3",
    "hla_n",
    "hla_q",
    "linear_attn",
    "published",
    "reference",
    "step",
]

_LAZY = {
    "HigherOrderLinearAttention": "hla.layers",
    "HLAConfig": "hla.models",
    "HLAModel": "hla.models",
    "HLAForCausalLM": "hla.models",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
