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
        ValueError: if transformers cannot read the file, or not all of it.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        reader = GGUFReader(path)
        config = AutoConfig.from_pretrained(**place)
        length = next((f for name, f in reader.fields.items() if name.endswith(".attention.key_length")), None)
        if length is not None and hasattr(config, "head_dim"):  # transformers does not read it for all families
            config.head_dim = int(length.contents())
        unpack = GgufConfig(dequantize=True)  # else the model counts as quantised and is neither cast nor saved
        model = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=dtype, quantization_config=unpack
        )
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # what transformers raises is of any kind and many lines
        raise ValueError(f"{path} cannot be read as GGUF: {' '.join(str(error).split())[:300]}") from error
    biases = [tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")]
    if len(biases) > sum(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise ValueError(
            f"{path} has biases, such as {biases[0]}, which transformers leaves out for {config.model_type}; "
            "load the model from safetensors."
        )
    return model.eval(), tokenizer
