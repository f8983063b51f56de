"""Momentum whose singular values are all made equal."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.methods import check_count
from ..core.states import State
from ..core.transforms import Transform
from ..linalg import MUON, newton_schulz
from .adam import adam
from .sgd import Momentum

Precision = Literal["auto", "bfloat16", "full"]


@dataclass(frozen=True, kw_only=True)
class Orthogonalize(Transform):
    """Replace steps (k, m, n) by nearly the nearest semi-orthogonal matrices times sqrt(max(least, m / n)).

    Args:
        polynomials: one a step of the Newton-Schulz iteration; ``POLAR_EXPRESS`` for steps that converge.
        least: 1 gives Muon's length; with 0 the norm from root mean square to root mean square is one.
        precision: of the iteration: bfloat16 as published, the full one of the steps, or bfloat16 on a GPU alone.
    """

    polynomials: tuple[tuple[float, float, float], ...] = (MUON,) * 5
    least: float = 1.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}."
            )
        check_count("the number of polynomials", len(self.polynomials))
        if not self.least >= 0:
            raise ValueError(f"least must be >= 0, got {self.least}.")

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        m, n = grad.shape[1:]
        short = self.precision == "bfloat16" or (self.precision == "auto" and grad.is_cuda)
        unit = newton_schulz(grad, self.polynomials, dtype=torch.bfloat16 if short else None)
        return unit.mul_(max(self.least, m / n) ** 0.5)


def muon(
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    polynomials: tuple[tuple[float, float, float], ...] = (MUON,) * 5,
    precision: Precision = "auto",
    other: Transform = adam(betas=(0.9, 0.95), eps=1e-10),  # noqa: B008 (frozen)
) -> Transform:
    """Muon: momentum, orthogonalised; its state is half of Adam's.

    For hidden matrices and convolutions, seen as (out, rest). Embeddings, the head and vectors should get Adam
    in a group of their own, with its own lr; vectors in this group get ``other``.

    >>> [type(part).__name__ for part in muon().matrix.parts]
    ['Momentum', 'Orthogonalize']

    Args:
        beta: of the mean of gradients.
        nesterov: look one step ahead.
        polynomials: of the Newton-Schulz iteration.
        precision: of its products: "bfloat16" as published, which is faster where processors have units for it;
            "full", that of the gradients; or "auto", bfloat16 on GPUs alone.
        other: for vectors and scalars.

    References: Jordan et al., 2024, kellerjordan.github.io/posts/muon. There 4-D gradients are scaled by the
    sides of the kernel; here by those of the matrix (out, rest).
    """
    orthogonal = Orthogonalize(polynomials=polynomials, precision=precision)
    matrix = chain(Momentum(beta=beta, nesterov=nesterov, average=True), orthogonal)
    return by_shape(matrix=matrix, other=other)
