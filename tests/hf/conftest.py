"""The marks of transformers' own tests, which `--strict-markers` would refuse."""

import torch

# PyTorch remembers its constructors at the first use of a device context: let it be those from before tests/conftest.py
# patches them, so that models load on the meta device as outside of tests.
with torch.device("meta"):
    torch.empty(1)

MARKS = """
accelerate_tests executorch_export_test flash_attn_3_test flash_attn_4_test flash_attn_test generate is_training_test
onnx_export_test order slow timeout torch_compile_test torch_export_test
""".split()


def pytest_configure(config):
    for name in MARKS:
        config.addinivalue_line("markers", f"{name}: of transformers' test suite")
