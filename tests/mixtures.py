"""Small random mixtures of experts, as transformers builds them, for tests of whole models."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def mixture(family: str, config: str = "", **changes: Any) -> Callable[[], Any]:
    """Return what makes a causal language model of a family."""
    kind = getattr(transformers, config or f"{family}Config")

    def make() -> Any:
        torch.manual_seed(0)
        options = {**SIZES, **HEADS, **ENDS, "initializer_range": 0.1, **changes}
        return getattr(transformers, f"{family}ForCausalLM")(kind(**options)).eval()

    return make


QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": mixture("Mixtral", num_local_experts=3),  # linear(x, W); a file holds each expert for itself
    "qwen2 moe": mixture("Qwen2Moe", **QWEN, shared_expert_intermediate_size=40),
    "qwen3 moe": mixture("Qwen3Moe", **QWEN),
    "gpt-oss": mixture("GptOss", num_local_experts=4, num_experts_per_tok=2, **PLAIN),  # x @ W, with biases
    "llama4": mixture(
        "Llama4", config="Llama4TextConfig", num_local_experts=3, intermediate_size_mlp=40
    ),  # bmm(x, W)
}
