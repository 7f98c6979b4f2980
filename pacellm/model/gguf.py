"""Models in GGUF files, through transformers' reader: their weights are dequantised."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an ordinary checkpoint of a GGUF file.

    Args:
        file: the GGUF file.
        directory: is made.
        dtype: of its weights.
    """
    where, name = str(file.parent), file.name
    module = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    module.hf_quantizer = None  # it was read as quantised; what is written is not
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
