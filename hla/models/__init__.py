"""The language model on transformers; importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hla.models.cache_hla import HLACache, HLACacheLayer
from hla.models.configuration_hla import SIZES, HLAConfig
from hla.models.modeling_hla import HLAForCausalLM, HLAModel, HLAPreTrainedModel, count_parameters
from hla.models.remote_code import add_remote_code

AutoConfig.register("hla", HLAConfig, exist_ok=True)
AutoModel.register(HLAConfig, HLAModel, exist_ok=True)
AutoModelForCausalLM.register(HLAConfig, HLAForCausalLM, exist_ok=True)

__all__ = [
    "HLACache",
    "HLACacheLayer",
    "HLAConfig",
    "HLAForCausalLM",
    "HLAModel",
    "HLAPreTrainedModel",
    "SIZES",
    "add_remote_code",
    "count_parameters",
]
