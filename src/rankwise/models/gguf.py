"""GGUF files, dequantised to ordinary models."""

from pathlib import Path
from typing import Any

import torch


def from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read a GGUF file of a causal language model.

    Args:
        path: of the file.
        dtype: of the dequantised weights.

    Returns:
        an ordinary model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: if transformers cannot read the file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        unpack = GgufConfig(dequantize=True)  # else the model counts as quantised and is neither cast nor saved
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, quantization_config=unpack)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # what transformers raises is of any kind and many lines
        raise ValueError(f"{path} cannot be read as GGUF: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), tokenizer
