"""Affine maps of the square blocks of a weight (Bat, the first Bone)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from ..core.methods import Adapter, check_count
from ..core.statistics import Stats
from ..matrices import Base, BlockAffine, StructuredMatrix
from ..matrices.base import TooSmallError


@dataclass(frozen=True, kw_only=True)
class Bat(Adapter):
    """Train T_i (b, b), from zero, in W'_ij = W_ij + (W_ij + I) T_i, for the blocks W_ij in the i-th row of
    blocks.

    It trains m b numbers, as many as :class:`Miss` of rank b, and its change has full rank in general. The change
    is written out in every forward and every backward pass, at m n b multiply-adds, and not kept between them.

    Names: this is the Bone of 2024, "block affine transformation", later called Bat, and it is PEFT's ``MISS``
    with the weights ``bat``. What the paper of 2025 calls Bone is :class:`Miss`.

    PEFT takes a merged change out again by (I + T_i)^-1, which may not exist; here W never changes.

    Args:
        block: b, which must divide both sides of W; 64 is the published choice.

    Learning rate: 2e-5, that of its authors' script, the same for both forms; small models bear more.

    References: Kang et al., "Bone: Block affine transformation as parameter efficient fine-tuning methods for
        large language models", the first version (2024) of arXiv 2409.15371.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> adapted = Bat(block=2).attach(Base(Dense(torch.eye(4))), {}, Generator())
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    8
    """

    lr: ClassVar[float | None] = 2e-5
    block: int = 64

    def __post_init__(self) -> None:
        check_count("block", self.block)

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W' with T = 0."""
        m, n = base.shape
        if self.block > min(m, n):
            raise TooSmallError(f"block {self.block} is larger than a side of ({m}, {n}); give a smaller one.")
        if m % self.block or n % self.block:
            divisor = math.gcd(self.block, m, n)
            raise ValueError(
                f"block {self.block} does not divide both {m} and {n}; give a divisor, such as {divisor}."
            )
        wide = torch.promote_types(base.dtype, torch.float32)
        sizes = m // self.block, self.block, self.block
        return BlockAffine(base, torch.zeros(sizes, dtype=wide, device=base.device))
