"""The small random language models that tests of whole models use, and data for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama(**changes) -> LlamaForCausalLM:
    """A Llama of two layers with grouped queries and tied embeddings; ``changes`` are fields of its config."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).eval()


def gpt2(**changes) -> GPT2LMHeadModel:
    """A GPT-2 of two layers, which stores its weights transposed and query, key and value in one."""
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))


def ids() -> Tensor:
    """Random tokens, (12, 20)."""
    return torch.randint(3, 64, (12, 20), generator=Generator().manual_seed(1))


def plain() -> list[Any]:
    """Two batches of token ids."""
    return list(ids().split(6))


def padded() -> list[Any]:
    """Two batches of token ids with padding."""
    mask = torch.ones(12, 20, dtype=torch.long)
    mask[::3, 13:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids().split(6), mask.split(6), strict=True)]


WORDS = [f"{a}{b}{c}" for a in "abcde" for b in "aeiou" for c in "nrst"]


def worded() -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def saved(path: Path) -> Path:
    """A Llama of two layers with a tokenizer of whole words, saved by plain transformers."""
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    llama(vocab_size=len(WORDS) + 3, initializer_range=0.3, **ends).save_pretrained(path)
    worded().save_pretrained(path)
    return path
