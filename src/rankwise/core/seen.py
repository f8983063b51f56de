"""Transforms that see matrices in another shape."""

import abc
import dataclasses

from torch import Tensor

from .directions import Direction, formed
from .states import State
from .transforms import Transform


@dataclasses.dataclass(frozen=True)
class Seen(Transform):
    """Lets a transform see matrices in another shape."""

    inner: Transform

    @abc.abstractmethod
    def there(self, values: Tensor) -> Tensor:
        """Return matrices (k, m, n) as the inner transform sees them."""

    @abc.abstractmethod
    def back(self, seen: Direction, like: Tensor) -> Direction:
        """Return what the inner transform made in the shape of ``like`` (k, m, n)."""

    def init(self, param: Tensor, index: Tensor) -> State:
        """The state of what is seen."""
        return self.inner.init(self.there(param), index)

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, m, n) -> (k, m, n)."""
        return formed(self.update_unformed(grad, state, param))

    def update_unformed(self, grad: Tensor, state: State, param: Tensor) -> Direction:
        """(k, m, n) -> (k, m, n)."""
        return self.back(self.inner.update_unformed(self.there(grad), state, self.there(param)), grad)

    def reduce(self, grad: Tensor, state: State, param: Tensor) -> Tensor | None:
        """The inner reduced form."""
        return self.inner.reduce(self.there(grad), state, self.there(param))

    def update_reduced(self, low: Tensor, state: State, param: Tensor) -> Direction:
        """(k, ...) -> (k, m, n)."""
        return self.back(self.inner.update_reduced(low, state, self.there(param)), param)

    @property
    def reads_param(self) -> bool:
        """Whether the inner transform does."""
        return self.inner.reads_param

    @property
    def constrains(self) -> bool:
        """Whether the inner transform does."""
        return self.inner.constrains

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """The inner constraint."""
        return formed(self.back(self.inner.constrain(self.there(param), state, lr, weight_decay), param))


@dataclasses.dataclass(frozen=True)
class Wide(Seen):
    """Show matrices so that their rows are the shorter side: the one place where sides are chosen."""

    def there(self, values: Tensor) -> Tensor:
        """Transpose tall ones."""
        return values.mT if _is_tall(values) else values

    def back(self, seen: Direction, like: Tensor) -> Direction:
        """Transpose what was tall."""
        return seen.mT if _is_tall(like) else seen


@dataclasses.dataclass(frozen=True)
class Entries(Seen):
    """Show a matrix (k, m, n) as a column (k, mn, 1), of which each entry is a row."""

    def there(self, values: Tensor) -> Tensor:
        """One row after the other."""
        return values.flatten(1).unsqueeze(-1)

    def back(self, seen: Direction, like: Tensor) -> Direction:
        """Cut into rows."""
        return formed(seen).reshape(like.shape)


def wide(inner: Transform) -> Transform:
    """Let a transform see matrices (k, m, n) with m <= n, transposed where they are taller."""
    return Wide(inner)


def _is_tall(values: Tensor) -> bool:
    return values.shape[-2] > values.shape[-1]
