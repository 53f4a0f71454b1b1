"""transformers' own tests of a model, run on HLA: what its mixins ask of every model in the library.

The mixins are part of the source of transformers, not of its wheel, and are not copied here: `TRANSFORMERS_SOURCE`
names a folder with the `tests/` of the installed version (docs/huggingface.md says how to get one). Without it,
everything here is skipped.
"""

import os
import sys
import unittest
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers.models.auto import modeling_auto

from hla.layer_state import state_tensors
from hla.models import HLACache, HLACacheLayer, HLAConfig, HLAForCausalLM, HLAModel

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE names no source tree of transformers", allow_module_level=True)


def suite():
    """The mixins. Their package is called `tests`, as ours is, so it takes that name only while it is imported."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tests"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(Path(SOURCE).resolve()))
    try:
        from tests.test_configuration_common import ConfigTester
        from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
        from tests.test_training_mixin import TrainingTesterMixin
    finally:
        del sys.path[0]
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        sys.modules.update(ours)
    return ConfigTester, GenerationTesterMixin, ModelTesterMixin, TrainingTesterMixin, ids_tensor


ConfigTester, GenerationTesterMixin, ModelTesterMixin, TrainingTesterMixin, ids_tensor = suite()

SKIPPED = {
    "test_keep_in_fp32_modules_exist": "the list names parameters of every operator; a model has those of its own",
    "test_generate_compile_model_forward_fullgraph": "asks that the default cache does not compile; ours always does",
    **{
        f"test_model_rope_scaling_from_config_{kind}": "scaled RoPE is refused by HLAConfig"
        for kind in ("0_linear", "1_dynamic", "2_yarn")
    },
}


class TinyModel:
    """The tiny model of the mixins; the sizes their tests expect."""

    causal_lm_class, base_model_class = HLAForCausalLM, HLAModel
    sequence_classification_class = None
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 99

    def __init__(self, layer_types):
        self.layer_types = layer_types

    def get_config(self):
        return HLAConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads, intermediate_size=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, layer_types=self.layer_types, tie_word_embeddings=False,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.tril(torch.ones_like(ids))  # rows of different lengths
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (HLAModel, HLAForCausalLM)
    pipeline_model_mapping = {}
    layer_types = ["linear_attention", "linear_attention"]
    has_attentions = False
    model_tester = None

    def setUp(self):
        reason = SKIPPED.get(self._testMethodName)
        if reason:
            self.skipTest(reason)
        self.model_tester = TinyModel(self.layer_types)
        # The mixins choose by class name what has a loss, from tables that know only transformers' own classes; they
        # also ask whether the cache is one of transformers' own.
        for table, entry in (
            (modeling_auto.MODEL_MAPPING_NAMES, {"hla": "HLAModel"}),
            (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, {"hla": "HLAForCausalLM"}),
            (
                GenerationTesterMixin._check_caches_are_equal.__globals__,
                {"StaticCache": HLACache, "DynamicCache": HLACache},
            ),
        ):
            known = patch.dict(table, entry)
            known.start()
            self.addCleanup(known.stop)

    def test_config(self):
        ConfigTester(self, config_class=HLAConfig, common_properties=["hidden_size"]).run_common_tests()

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        assert isinstance(past_key_values, HLACache)
        for layer in past_key_values.layers:
            if isinstance(layer, HLACacheLayer):
                assert all(x.shape[0] == batch_size for x in state_tensors(layer.state))
            else:
                assert layer.keys.shape[:3:2] == (batch_size, seq_length)

    def _check_caches_are_equal(self, cache1, cache2):
        for a, b in zip(cache1.layers, cache2.layers, strict=True):
            pairs = (
                zip(state_tensors(a.state), state_tensors(b.state), strict=True)
                if isinstance(a, HLACacheLayer)
                else ((a.keys, b.keys), (a.values, b.values))
            )
            for x, y in pairs:
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


class TestLinear(Suite, unittest.TestCase):
    pass


class TestHybrid(Suite, unittest.TestCase):
    layer_types = ["linear_attention", "full_attention"]

    @unittest.skip("softmax layers are given a mask as long as the text, so a step compiles again when that changes")
    def test_static_cache_no_recompile_with_smaller_length(self):
        pass


del Suite
