"""The start at the singular vectors of the weight's gradient (LoRA-GA)."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.methods import Initialiser
from ..core.statistics import Statistic, Stats, WeightGradient
from ..matrices import StructuredMatrix
from ..matrices.base import TooSmallError


@dataclass(frozen=True, kw_only=True)
class GradientSvd(Initialiser):
    """A = c V_1' and B = c U_2, with V_1 the first r right singular vectors of the gradient G and U_2 the next
    r left.

    A step of gradient descent then changes W by -lr s^2 (B B' G + G A' A) = -lr (s c)^2 G_2r, but for what is of
    second order in lr: the best approximation of full fine-tuning's step that 2 r directions allow, where B = 0
    allows r at most. G is the mean over the calibration data, held against labels of the data.

    The authors' code finds the vectors with a randomised decomposition that no seed fixes, and puts the rest
    W - s B A in the place of W, which half precision rounds; here the decomposition is exact, and W stays. PEFT's
    has the same directions, but multiplies B by the singular values of G and leaves A at length 1, so that its
    start depends on the units of the loss, and its first step is not the one above.

    Args:
        gamma: c^2 = sqrt(m) / gamma, the published rule, so that the size of what a layer puts out does not
            depend on its width; 16 is the published choice. It does not look at s. None means c = 1 / s: the
            step is that of full fine-tuning, with gradient descent.

    References: Wang, Yu, Li, "LoRA-GA: Low-rank adaptation with gradient approximation", NeurIPS 2024, arXiv
        2407.05000; the rule of ``gamma`` is that of its code.
    """

    gamma: float | None = 16.0

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be a positive number or None, got {self.gamma!r}.")

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The mean gradient of the weight."""
        return (WeightGradient,)

    def largest(self, m: int, n: int) -> int:
        """Half of the directions that there are, since A and B take different ones."""
        return min(m, n) // 2

    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Decompose the gradient.

        Raises:
            TooSmallError: if the gradient has no 2 r directions.
            ValueError: if the gradient is zero.
        """
        m, n = base.shape
        if rank > self.largest(m, n):
            raise TooSmallError(
                f"a start at the gradient takes 2 r directions of an ({m}, {n}) matrix; rank must be at most "
                f"{self.largest(m, n)}, not {rank}."
            )
        gradient = stats[WeightGradient].value()
        if not bool(gradient.any()):
            raise ValueError(
                "the gradient of the weight is zero; give data with labels that the loss depends on."
            )
        u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
        size = 1 / scale if self.gamma is None else math.sqrt(math.sqrt(m) / self.gamma)
        return (size * u[:, rank : 2 * rank]).float(), (size * vt[:rank]).float()
