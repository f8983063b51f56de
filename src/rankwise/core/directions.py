"""Directions of steps that are products, which need not be formed to be taken."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..linalg import product


@dataclass(frozen=True, eq=False)
class Factors:
    """The matrices left @ right, (k, m, r) @ (k, r, n), or their transposes.

    Args:
        left: (k, m, r).
        right: (k, r, n).
        transposed: whether (k, n, m) is meant.
    """

    left: Tensor
    right: Tensor
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrices."""
        return self.right.dtype

    @property
    def mT(self) -> Self:
        """The transposes."""
        return type(self)(self.left, self.right, not self.transposed)

    def each(self) -> list[Self]:
        """One product (1, m, n) for each of k."""
        pairs = zip(self.left.split(1), self.right.split(1), strict=True)
        return [type(self)(left, right, self.transposed) for left, right in pairs]

    def formed(self) -> Tensor:
        """The matrices themselves, in the order in memory that ``right`` suggests."""
        whole = product(self.left, self.right)
        return whole.mT if self.transposed else whole


Direction = Tensor | Factors


def formed(direction: Direction) -> Tensor:
    """Return a direction as a tensor."""
    return direction.formed() if isinstance(direction, Factors) else direction


def add_to(values: Tensor, direction: Direction, *, keep: float = 1.0, factor: float = 1.0) -> Tensor:
    """Write keep * values + factor * direction into values (k, ...), of the same type; returns these."""
    if isinstance(direction, Tensor):
        return (values if keep == 1 else values.mul_(keep)).add_(direction, alpha=factor)
    target, left, right = values.mT if direction.transposed else values, direction.left, direction.right
    if len(target) == 1:
        target[0].addmm_(left[0], right[0], beta=keep, alpha=factor)
    else:
        target.baddbmm_(left, right, beta=keep, alpha=factor)
    return values
