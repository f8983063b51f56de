"""Rows of a cosine transform of the gradient: a fixed orthogonal basis, of which only numbers are kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.directions import Direction, Factors
from ..core.states import State, moved
from ..core.subspaces import Projector
from ..linalg import cosine_rows, cosine_transform, product, seeded
from .bases import ChosenRows, largest_rows, side_of
from .rows import random_rows


@dataclass(frozen=True)
class Cosine(ChosenRows):
    """Choose the frequencies along the shorter side in which the gradient is largest.

    Its state is r numbers, and a fit is a fast Fourier transform. On gradients whose neighbouring rows have
    nothing in common this holds no more than any other fixed basis, and :class:`LargestRows` costs less: compare
    the shares they hold.

    References: Modoranu et al., "FFT-based dynamic subspace selection", 2025, arXiv 2505.17967. There the score
    is the sum of sizes by default; here it is the sum of squares, for which the choice is the best of this basis.
    """

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Compare the squares of the transform."""
        energy = cosine_transform(grad).square().sum(-1)
        return {**state, "rows": largest_rows(energy, self.rank(state))}

    def down(self, grad: Tensor, state: State) -> Tensor:
        """(k, s, any) -> (k, r, any)."""
        return product(cosine_rows(state["rows"], side_of(state), grad.dtype), grad)

    def lift(self, low: Tensor, state: State) -> Direction:
        """(k, r, any) -> (k, s, any)."""
        return Factors(cosine_rows(state["rows"], side_of(state), low.dtype).mT, low)


@dataclass(frozen=True)
class RandomOrthogonal(Projector):
    """Project on a random orthonormal basis: random frequencies of the gradient with random signs of its rows.

    It is drawn again from a seed whenever it is needed, so its state is whole numbers. This transform preserves
    lengths like a uniformly random basis (the subsampled randomised transform of Ailon and Chazelle, and Tropp).
    """

    def init(self, grad: Tensor, rank: int, index: Tensor) -> State:
        """The first r frequencies; signs follow from the place of the parameter and the number of the fit."""
        return ROWS.init(grad, rank, index)

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Draw other frequencies and signs."""
        return {**state, "rows": random_rows(state).to(grad.device), "fits": state["fits"] + 1}

    def down(self, grad: Tensor, state: State) -> Tensor:
        """(k, s, any) -> (k, r, any)."""
        return product(self._rows(state, grad), grad)

    def lift(self, low: Tensor, state: State) -> Direction:
        """(k, r, any) -> (k, s, any)."""
        return Factors(self._rows(state, low).mT, low)

    def rank(self, state: State) -> int:
        """The number of frequencies."""
        return ROWS.rank(state)

    def _rows(self, state: State, like: Tensor) -> Tensor:
        """The basis, transposed: (k, r, s)."""
        side = side_of(state)
        seeds = zip(state["index"].tolist(), state["fits"].tolist(), strict=True)
        bits = [torch.randint(2, (side,), generator=seeded(*seed, 1)) for seed in seeds]
        signs = moved(2 * torch.stack(bits) - 1, like)
        return cosine_rows(state["rows"], side, like.dtype) * signs[:, None, :]


ROWS = Cosine()
