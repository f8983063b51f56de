"""Random matrices of every kind, and models that hold them, for tests of whole models."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from rankwise.core.surgery import replace, select
from rankwise.matrices import (
    Dense,
    Diagonal,
    LowRank,
    Permutation,
    PivotedLowRank,
    Product,
    Quantized,
    Scaled,
    Sparse,
    StructuredMatrix,
    Sum,
)

IDS = torch.arange(12).view(2, 6)


def quantized(m: int, n: int) -> Quantized:
    codes = torch.randint(16, (m, n))
    return Quantized.from_codes(
        codes, torch.rand(m, -(-n // 32)) / 16, torch.randn(m, -(-n // 32)), bits=4, group=32
    )


def sparse(m: int, n: int) -> Sparse:
    return Sparse.from_dense(torch.randn(m, n) * (torch.rand(m, n) < 0.3))


def low_rank(m: int, n: int) -> LowRank:
    return LowRank(torch.randn(m, 3), torch.randn(3, n) / 8)


def pivoted(m: int, n: int) -> PivotedLowRank:
    return PivotedLowRank.from_factors(torch.randn(m, 5), torch.randn(5, n) / 8)


def around(m: int, n: int) -> Scaled:
    middle = Dense(torch.randn(m, n) / 8)
    return Scaled(Product(Diagonal(torch.randn(m)), middle, Permutation(torch.randperm(n))), 0.5)


def low_bit_and_low_rank(m: int, n: int) -> Sum:
    return Sum(quantized(m, n), low_rank(m, n))


STRUCTURES = [low_rank, pivoted, quantized, sparse, around, low_bit_and_low_rank]


def filled(model: nn.Module, *kinds: Callable[[int, int], StructuredMatrix]) -> nn.Module:
    """Put random matrices, of each kind in turn, in the place of all layers."""
    torch.manual_seed(1)
    for i, site in enumerate(select(model).values()):
        matrix = kinds[i % len(kinds)](*site.weight.shape)
        replace(model, site, matrix.to(site.weight.dtype))
    return model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertModel(BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).eval()


def output(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*inputs)[0]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
