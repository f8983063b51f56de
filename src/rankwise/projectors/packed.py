"""A stored basis in few bits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.directions import Direction, Factors
from ..core.methods import check_count
from ..core.states import State
from ..core.subspaces import Projector
from ..linalg import choose_grids, nearest_codes, pack_fitting, product, unpack
from ..linalg.rounding import SHRINKS
from .bases import StoredBasis, side_of
from .warm_power import WarmPower


@dataclass(frozen=True, kw_only=True)
class Packed(Projector):
    """Keep the basis of another projector in 4 bits a number, two to a byte.

    Rounded columns D are no longer orthonormal: steps would be too long or too short by what D' D differs from 1.
    So D L'^-1 with the Cholesky factor D' D = L L' is the basis, which is solved for whenever it is used.

    Args:
        projector: finds the basis, from the last packed one where it goes on from one.
        bits: of a number, 1 to 8.
        group: how many neighbours in a column share a scale and an offset.

    References: Zhang et al., "Q-GaLore", 2024, arXiv 2407.08296. There the rounded columns are used as they are,
    a code takes a byte, and groups without a zero in their range are not reproduced.
    """

    projector: StoredBasis = WarmPower()  # noqa: RUF009 (frozen)
    bits: int = 4
    group: int = 256

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"bits must be 1 ... 8, got {self.bits}.")
        check_count("group", self.group)

    def init(self, grad: Tensor, rank: int, index: Tensor) -> State:
        """The first basis of the projector, packed, and the number of its rows."""
        side = torch.full_like(index, grad.shape[-2])
        return self._packed({**self.projector.init(grad, rank, index), "side": side}, ranges=1)

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Unpack, fit and pack."""
        rounded, root = self._factors(state)
        columns = torch.linalg.solve_triangular(root, rounded.mT, upper=False).mT
        return self._packed(self.projector.fit(grad, {**state, "columns": columns}, first=first))

    def down(self, grad: Tensor, state: State) -> Tensor:
        """(k, s, any) -> (k, r, any)."""
        rounded, root = self._factors(state)
        return torch.linalg.solve_triangular(root, product(rounded.mT, grad), upper=False)

    def lift(self, low: Tensor, state: State) -> Direction:
        """(k, r, any) -> (k, s, any)."""
        rounded, root = self._factors(state)
        return Factors(rounded, torch.linalg.solve_triangular(root.mT, low, upper=True))

    def rank(self, state: State) -> int:
        """The number of columns."""
        return state["codes"].shape[-2]

    def _packed(self, state: State, ranges: int = SHRINKS) -> dict[str, Any]:
        """Write codes (k, r, bytes), scales and offsets (k, r, groups) in the place of columns (k, s, r)."""
        left = {key: value for key, value in state.items() if key not in ("columns", "codes", "scale", "offset")}
        columns = state["columns"]
        k, side, rank = columns.shape
        values = columns.mT.reshape(k * rank, side).double()
        weights = torch.ones(side, dtype=values.dtype, device=values.device)
        scale, offset = choose_grids(values, weights, self.bits, self.group, columns.dtype, ranges)
        a, b = (each.repeat_interleave(self.group, 1)[:, :side] for each in (scale, offset))
        codes = pack_fitting(nearest_codes(values, a, b, self.bits), self.bits)
        kept = {"codes": codes, "scale": scale.to(columns.dtype), "offset": offset.to(columns.dtype)}
        return {**left, **{key: value.view(k, rank, value.shape[-1]) for key, value in kept.items()}}

    def _factors(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the rounded columns D (k, s, r), and L (k, r, r) with L L' = D' D.

        A little is added to D' D, so that columns that rounding has made to depend on each other do not stop the
        training: what lies along them is nearly dropped.
        """
        side, shape = side_of(state), state["codes"].shape
        codes = unpack(state["codes"].flatten(0, 1), self.bits)[:, :side].view(*shape[:2], side)
        scale, offset = (state[key].repeat_interleave(self.group, -1)[..., :side] for key in ("scale", "offset"))
        rounded = (codes * scale).add_(offset).mT
        gram = rounded.mT @ rounded
        gram.diagonal(dim1=-2, dim2=-1).add_(shape[1] * torch.finfo(gram.dtype).eps)
        return rounded, torch.linalg.cholesky(gram)
