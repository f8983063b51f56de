"""The leading singular vectors of the gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State
from .bases import StoredBasis


@dataclass(frozen=True)
class Svd(StoredBasis):
    """Project on the leading singular vectors: the best basis of a gradient, and by far the slowest to find.

    Signs are chosen so that the largest entry of each vector is positive.
    """

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Decompose."""
        vectors = torch.linalg.svd(grad, full_matrices=False).U[..., : self.rank(state)]
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        return {**state, "columns": vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)}
