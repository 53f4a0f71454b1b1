"""Makes a saved model loadable with `trust_remote_code=True` where `hla` is installed but was not imported."""

from __future__ import annotations

import json
from pathlib import Path

MODULE = "hla_model"
CLASSES = {"AutoConfig": "HLAConfig", "AutoModel": "HLAModel", "AutoModelForCausalLM": "HLAForCausalLM"}
# Classes of its own, so that saving a loaded model again writes this file and not the library's source.
SOURCE = '''"""The model is in the package `hla`; this file lets transformers find it."""

import hla


class HLAConfig(hla.HLAConfig):
    pass


class HLAModel(hla.HLAModel):
    config_class = HLAConfig


class HLAForCausalLM(hla.HLAForCausalLM):
    config_class = HLAConfig
'''


def add_remote_code(folder: str | Path) -> None:
    """Adds `hla_model.py` to a folder written by `save_pretrained`, and an `auto_map` to its `config.json`.

    Raises:
        FileNotFoundError: the folder has no config.json.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in CLASSES.items()}
    path.with_name(f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
