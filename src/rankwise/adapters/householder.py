"""A frozen weight whose inputs are turned by a few trained reflections."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from ..core.methods import Ranked
from ..core.statistics import Stats
from ..matrices import Base, Branch, Product, Reflections, StructuredMatrix
from ..matrices.base import TooSmallError


@dataclass(frozen=True, kw_only=True)
class Householder(Ranked):
    """Train v_1 ... v_r in W H_1 ... H_r, with H_i = I - 2 v_i v_i' / |v_i|^2 and W frozen.

    The reflections start as pairs that cancel, so the product starts as the identity, and it stays orthogonal
    without a penalty or a retraction: singular values, and lengths of rows, are those of W. Half of the vectors
    are random and the other half equal them; each pair then turns a plane of its own. The vectors are float32
    where W is in half precision. Do not decay them: their lengths mean nothing, and short ones turn faster.

    The published code of the Householder Projector fills its vectors with LAPACK's factor and the triangle above
    it, whose product is not the matrix that it started from, writes in place into what the gradient needs, and
    does not save its rank; here the vectors are a parameter, and the triangle is found from them.

    Args:
        rank: r, even; n makes every rotation possible. 8 is the count of HRA's authors for GLUE.
        ranks: from :mod:`rankwise.rank_rules`; None gives all layers the same.

    Learning rate: 1e-2, that of HRA's authors' script for DeBERTa-v3-base on MNLI; for LLaMA-2 7B theirs says
    1e-5. For the former their vectors begin with numbers uniform below (2 / r)^1/2: with r = 8 they are 0.29
    times as long as ours, and the same step turns them further.

    References: Yuan, Liu, Xu, "Bridging the gap between low-rank and orthogonal adaptation via Householder
        reflection adaptation" (HRA), NeurIPS 2024, arXiv 2405.17484, for the adapter; Song et al., "Householder
        Projector for unsupervised latent semantics discovery", ICCV 2023, arXiv 2307.08012, for trained
        reflections.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> adapted = Householder(rank=2).attach(Base(Dense(torch.eye(4))), {}, Generator())
    >>> bool(torch.allclose(adapted.dense(), torch.eye(4), atol=1e-6))
    True
    """

    step: ClassVar[int] = 2
    lr: ClassVar[float | None] = 1e-2

    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 2 or self.rank % 2:
            raise ValueError(f"rank must be even and >= 2 (reflections start in pairs), got {self.rank!r}.")

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return W H_1 ... H_r."""
        _, n = base.shape
        if self.rank > n:
            raise TooSmallError(f"{n} reflections make every rotation of {n} inputs; lower rank.")
        half = torch.randn(self.rank // 2, n, generator=generator)
        wide = torch.promote_types(base.dtype, torch.float32)
        pairs = half.repeat_interleave(2, dim=0).to(base.device, wide)
        return Product(base, Branch(Reflections(pairs)))
