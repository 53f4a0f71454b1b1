"""The command line of transformers with the HLA models known to it: ``python -m hla.transformers_cli serve ...``."""

import transformers
from transformers.cli.transformers import main

from hla.models import HLAForCausalLM

# Importing hla.models tells the Auto classes; `serve` looks for the class that config.json names in `transformers`.
transformers.HLAForCausalLM = HLAForCausalLM  # type: ignore[attr-defined]

if __name__ == "__main__":
    main()
