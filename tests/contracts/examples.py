"""One example of every exported kind of matrix; a kind without one fails the contract suite."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rankwise.linalg import distance, soft
from rankwise.matrices import (
    Base,
    BlockAffine,
    Branch,
    ChangedFactors,
    Companded,
    Dense,
    Diagonal,
    Frozen,
    Hypercomplex,
    IndexedSparse,
    KeptColumn,
    Kernelled,
    Kronecker,
    LowRank,
    Permutation,
    PivotedLowRank,
    Product,
    Quantized,
    Recomputed,
    Reflections,
    RowNormalised,
    Scaled,
    Scheduled,
    Seeded,
    SemiSparse,
    Several,
    Sparse,
    Spectral,
    StructuredMatrix,
    Sum,
    Tiled,
)


def draw(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of one seed."""
    return torch.randn(*sizes, generator=Generator().manual_seed(seed), dtype=dtype)


def _sum() -> StructuredMatrix:
    return Sum(Dense(draw(5, 4)), LowRank(draw(5, 2, seed=1), draw(2, 4, seed=2)))


def _product() -> StructuredMatrix:
    order = torch.tensor([3, 0, 4, 1, 2])
    return Product(Permutation(order), Diagonal(draw(5)), PivotedLowRank.from_factors(draw(5, 2), draw(2, 4)))


def _row_normalised() -> StructuredMatrix:
    matrix = RowNormalised.of(Base(Dense(draw(5, 4))), Branch(LowRank(draw(5, 2), draw(2, 4)), 0.5))
    matrix.lengths.data *= 1 + draw(5).abs()
    return matrix


def _changed_factors() -> StructuredMatrix:
    base = Sum(Dense(draw(5, 4)), PivotedLowRank.from_factors(draw(5, 2), draw(2, 4)))
    return ChangedFactors(Base(base), {"members.1.mix": LowRank(draw(2, 1, seed=1), draw(1, 2, seed=2))})


def _quantized() -> StructuredMatrix:
    codes = torch.arange(20).view(5, 4) % 8
    return Quantized.from_codes(codes, draw(5, 2), draw(5, 2, seed=1), bits=3, group=3)


def _kernelled() -> StructuredMatrix:
    points = draw(2, 5, 3), draw(2, 4, 3, seed=1)
    mixing = torch.tensor([0.7, 1.3, 0.1], dtype=torch.float64)
    return Kernelled(*points, (0.4, -0.3), kernel=distance, shrink=soft, density=0.5, mixing=mixing)


def _several() -> StructuredMatrix:
    base = Base(Dense(draw(5, 4)))
    low = Sum(base, Branch(LowRank(draw(5, 2, seed=1), draw(2, 4, seed=2)), 0.5))
    rotated = Product(base, Reflections(draw(2, 4, seed=3)))
    return Several(
        base, {"low": low, "rotated": rotated, "idle": _row_normalised()}, {"low": 0.7, "rotated": -0.2}
    )


EXAMPLES: dict[str, Callable[[], StructuredMatrix]] = {
    "Base": lambda: Base(_sum()),
    "BlockAffine": lambda: BlockAffine(Base(Dense(draw(6, 4))), draw(3, 2, 2, seed=1)),
    "Branch": lambda: Branch(_sum(), 0.7),
    "ChangedFactors": _changed_factors,
    "Companded": lambda: Companded(draw(5, 4), height=0.7, width=1.3, learned=True),
    "Dense": lambda: Dense(draw(5, 4)),
    "Diagonal": lambda: Diagonal(draw(5)),
    "Frozen": lambda: Frozen(_sum()),
    "Hypercomplex": lambda: Hypercomplex(draw(2, 2, 2), draw(2, 3, 1), draw(2, 1, 2)),
    "IndexedSparse": lambda: IndexedSparse.from_dense(draw(5, 4) * (draw(5, 4, seed=1) > 0)),
    "KeptColumn": lambda: KeptColumn(Sum(Base(Dense(draw(5, 4))), LowRank(draw(5, 2), draw(2, 4))), 1),
    "Kernelled": _kernelled,
    "Kronecker": lambda: Kronecker(Dense(draw(2, 3)), LowRank(draw(3, 2), draw(2, 2, seed=1))),
    "LowRank": lambda: LowRank(draw(5, 2), draw(2, 4)),
    "Permutation": lambda: Permutation(torch.tensor([3, 0, 4, 1, 2])),
    "PivotedLowRank": lambda: PivotedLowRank.from_factors(draw(5, 2), draw(2, 4)),
    "Product": _product,
    "Quantized": _quantized,
    "Recomputed": lambda: Recomputed(_sum()),
    "Reflections": lambda: Reflections(draw(3, 5)),
    "RowNormalised": _row_normalised,
    "Scaled": lambda: Scaled(_sum(), -0.3),
    "Scheduled": lambda: Scheduled(_sum(), {"kind": "FreezeColumns", "until": 0.3}).eval(),
    "Seeded": lambda: Seeded(5, 4, seed=3),
    "SemiSparse": lambda: SemiSparse.from_dense(draw(5, 6), kept=2, group=3),
    "Several": _several,
    "Sparse": lambda: Sparse.from_dense(draw(5, 4) * (draw(5, 4, seed=1) > 0)),
    "Spectral": lambda: Spectral(draw(5, 3), draw(3), draw(3, 4, seed=1), torch.tensor([2, 0])).eval(),
    "Sum": _sum,
    "Tiled": lambda: Tiled(draw(2, 3), (5, 4)),
}
