"""Singular vectors from a random sketch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State
from ..linalg import draw_normal, orthonormal, power_steps
from .bases import StoredBasis


@dataclass(frozen=True, kw_only=True)
class Randomised(StoredBasis):
    """Find the leading singular vectors anew each time, from a random sketch that is a little wider.

    Args:
        oversampling: columns of the sketch beyond the rank.
        steps: of the power iteration, for spectra that fall slowly.

    References: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, arXiv 0909.4061; in GaLore 2
    (Su et al. 2025, arXiv 2504.20437).
    """

    oversampling: int = 8
    steps: int = 1

    def __post_init__(self) -> None:
        for name in ("oversampling", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Sketch, and decompose what the sketch spans."""
        side, length = grad.shape[-2:]
        width = min(self.rank(state) + self.oversampling, side)
        sketch = orthonormal(grad @ draw_normal((length, width), state["index"], grad))
        sketch = power_steps(grad, sketch, self.steps)
        small = sketch.mT @ grad  # (k, width, l): its Gram matrix is enough for the left vectors
        vectors = torch.linalg.eigh(small @ small.mT).eigenvectors.flip(-1)
        return {**state, "columns": sketch @ vectors[..., : self.rank(state)]}
