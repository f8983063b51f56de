"""What projectors share that keep a basis, or the numbers of rows."""

import torch
from torch import Tensor

from ..core.directions import Direction, Factors
from ..core.states import State
from ..core.subspaces import Projector
from ..linalg import product


class StoredBasis(Projector):
    """Keeps an orthonormal basis (k, s, r), and the place of the parameter for seeds."""

    def init(self, grad: Tensor, rank: int, index: Tensor) -> State:
        """A basis of the first r axes."""
        side = grad.shape[-2]
        eye = torch.eye(side, rank, dtype=grad.dtype, device=grad.device)
        return {"columns": eye.expand(len(grad), side, rank).contiguous(), "index": index.clone()}

    def down(self, grad: Tensor, state: State) -> Tensor:
        """(k, s, any) -> (k, r, any)."""
        return product(state["columns"].mT, grad)

    def lift(self, low: Tensor, state: State) -> Direction:
        """(k, r, any) -> (k, s, any)."""
        return Factors(state["columns"], low)

    def rank(self, state: State) -> int:
        """The number of columns."""
        return state["columns"].shape[-1]


class ChosenRows(Projector):
    """Keeps the numbers of r rows (k, r), the place of the parameter for seeds, and how often it was fitted."""

    def init(self, grad: Tensor, rank: int, index: Tensor) -> State:
        """The first r rows."""
        rows = torch.arange(rank, dtype=torch.int32, device=grad.device).expand(len(grad), rank)
        side = torch.full_like(index, grad.shape[-2])
        return {"rows": rows.contiguous(), "side": side, "index": index.clone(), "fits": torch.zeros_like(index)}

    def down(self, grad: Tensor, state: State) -> Tensor:
        """(k, s, any) -> (k, r, any)."""
        rows = state["rows"].long()[:, :, None]
        return grad.gather(1, rows.expand(-1, -1, grad.shape[-1]))

    def lift(self, low: Tensor, state: State) -> Direction:
        """(k, r, any) -> (k, s, any)."""
        rows = state["rows"].long()[:, :, None]
        full = low.new_zeros(len(low), side_of(state), low.shape[-1])
        return full.scatter_(1, rows.expand(-1, -1, low.shape[-1]), low)

    def rank(self, state: State) -> int:
        """The number of rows."""
        return state["rows"].shape[-1]


def side_of(state: State) -> int:
    """Return s, which all parameters of a stack share."""
    return int(state["side"][0])


def largest_rows(energy: Tensor, rank: int) -> Tensor:
    """Return the numbers (k, r) of the largest of (k, s), in order; of equal ones, the first."""
    order = energy.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :rank].sort(dim=-1).values.int()
