"""The start at a weight's own leading singular vectors (PiSSA)."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.methods import Initialiser
from ..core.statistics import Stats
from ..matrices import StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class SingularVectors(Initialiser):
    """B = U sqrt(Sigma / s) and A = sqrt(Sigma / s) V' of the r largest singular values of W.

    Args:
        iterations: None decomposes exactly; otherwise so many power iterations of a randomised decomposition with
            r + 8 spare directions: after 4 it leaves no more than 1.001 times what the exact one does, where the
            published code, without spare directions, leaves some 1.005 times as much.

    References: Meng, Wang, Zhang, "PiSSA", NeurIPS 2024, arXiv 2404.02948; the randomised decomposition is that
        of Halko, Martinsson, Tropp, 2011, arXiv 0909.4061.
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(f"iterations must be >= 0 or None, got {self.iterations}.")

    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Share each singular value among both sides."""
        u, s, vt = self.decomposed(base, rank, generator)
        root = (s / scale).sqrt()
        return u * root, root[:, None] * vt

    def decomposed(
        self, base: StructuredMatrix, rank: int, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (m, r), the r largest singular values and V' (r, n) of the base, in float32 or wider."""
        weight = base.dense().detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.iterations is not None:
            weight, basis = self._sketch(weight, rank, generator)
        else:
            basis = None
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        u = u if basis is None else basis @ u
        return u[:, :rank].contiguous(), s[:rank], vt[:rank].contiguous()

    def _sketch(self, weight: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return a few rows that hold most of the weight, and the orthonormal columns that they belong to."""
        assert self.iterations is not None
        m, n = weight.shape
        count = min(2 * rank + 8, m, n)
        sample = torch.randn(n, count, generator=generator).to(weight)
        basis = torch.linalg.qr(weight @ sample).Q
        for _ in range(self.iterations):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
        return basis.mT @ weight, basis
