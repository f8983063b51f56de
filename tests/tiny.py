"""The small random language model that tests of whole models use."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**changes) -> LlamaForCausalLM:
    """A Llama of two layers with grouped queries and tied embeddings; ``changes`` are fields of its config."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).eval()
