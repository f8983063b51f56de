"""Rows of the gradient themselves: no product at all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State
from ..linalg import seeded
from .bases import ChosenRows, largest_rows, side_of


@dataclass(frozen=True)
class LargestRows(ChosenRows):
    """Choose the rows (of the shorter side) in which the gradient is largest: its state is r numbers."""

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Compare the squares."""
        return {**state, "rows": largest_rows(grad.square().sum(-1), self.rank(state))}


@dataclass(frozen=True)
class RandomRows(ChosenRows):
    """Choose random rows (of the shorter side), others at each fit; the same on every machine."""

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Draw from a seed made of the parameter's place and the number of the fit."""
        return {**state, "rows": random_rows(state).to(grad.device), "fits": state["fits"] + 1}


@dataclass(frozen=True)
class RowBlock(ChosenRows):
    """Choose r rows (of the shorter side) side by side, the next ones at each fit, beginning at row 0 again."""

    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Move on by r."""
        rank, side = self.rank(state), side_of(state)
        begin = state["fits"].to(grad.device)[:, None] * rank
        rows = (begin + torch.arange(rank, device=grad.device)) % side
        return {**state, "rows": rows.int(), "fits": state["fits"] + 1}


def random_rows(state: State) -> Tensor:
    """Return r different numbers of rows for each parameter, (k, r) on the CPU, in increasing order."""
    side, rank = side_of(state), state["rows"].shape[-1]
    seeds = zip(state["index"].tolist(), state["fits"].tolist(), strict=True)
    drawn = [torch.randperm(side, generator=seeded(*seed))[:rank].sort().values for seed in seeds]
    return torch.stack(drawn).int()
