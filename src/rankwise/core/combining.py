"""Transforms one after the other, and one or another by the shape of a parameter."""

import dataclasses

from torch import Tensor

from .directions import Direction, formed
from .states import State
from .transforms import Transform, check_rank, rank_of


@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """One transform after the other; see :func:`chain`."""

    parts: tuple[Transform, ...]

    def init(self, param: Tensor, index: Tensor) -> State:
        """The states of the parts, by their numbers."""
        return {str(i): part.init(param, index) for i, part in enumerate(self.parts)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """Each part takes what the one before returns."""
        for i, part in enumerate(self.parts):
            grad = part.update(grad, state[str(i)], param)
        return grad

    def reduce(self, grad: Tensor, state: State, param: Tensor) -> Tensor | None:
        """The reduced form of the first part, which alone sees gradients."""
        return self.parts[0].reduce(grad, state["0"], param) if self.parts else None

    def update_reduced(self, low: Tensor, state: State, param: Tensor) -> Direction:
        """The first part makes a direction, which the others take."""
        direction = formed(self.parts[0].update_reduced(low, state["0"], param))
        for i, part in enumerate(self.parts[1:], 1):
            direction = part.update(direction, state[str(i)], param)
        return direction

    def rotate(self, state: State, rotation: Tensor) -> None:
        """Carry the states of all parts."""
        for i, part in enumerate(self.parts):
            part.rotate(state[str(i)], rotation)

    def acting_on(self, param: Tensor) -> Transform:
        """Those of the parts."""
        return Chain(tuple(part.acting_on(param) for part in self.parts))

    @property
    def elementwise(self) -> bool:
        """Whether all parts are."""
        return all(part.elementwise for part in self.parts)

    @property
    def reads_param(self) -> bool:
        """Whether any part does."""
        return any(part.reads_param for part in self.parts)

    @property
    def constrains(self) -> bool:
        """Whether any part does."""
        return any(part.constrains for part in self.parts)

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """The constraints of the parts, in order."""
        for i, part in enumerate(self.parts):
            param = part.constrain(param, state[str(i)], lr, weight_decay)
        return param


def chain(*parts: Transform) -> Transform:
    """Apply transforms in order; none of them is the gradient itself.

    >>> from rankwise.optimizers import muon
    >>> [type(part).__name__ for part in muon().matrix.parts]
    ['Momentum', 'Orthogonalize']
    """
    return parts[0] if len(parts) == 1 else Chain(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByShape(Transform):
    """One transform for matrices, another for vectors, scalars and matrices that are too small; see by_shape."""

    matrix: Transform
    other: Transform
    above: int | float = 0

    def __post_init__(self) -> None:
        check_rank(self.above, name="above")

    def _pick(self, like: Tensor) -> Transform:
        """The transform for tensors of this shape."""
        if like.ndim < 3:
            return self.other
        side = min(like.shape[1:])
        return self.matrix if side > rank_of(self.above, side) else self.other

    def init(self, param: Tensor, index: Tensor) -> State:
        """The state of the one that acts."""
        return self._pick(param).init(param, index)

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """The direction of the one that acts."""
        return self._pick(grad).update(grad, state, param)

    def update_unformed(self, grad: Tensor, state: State, param: Tensor) -> Direction:
        """The direction of the one that acts."""
        return self._pick(grad).update_unformed(grad, state, param)

    def reduce(self, grad: Tensor, state: State, param: Tensor) -> Tensor | None:
        """The reduced form of the one that acts."""
        return self._pick(param).reduce(grad, state, param)

    def update_reduced(self, low: Tensor, state: State, param: Tensor) -> Direction:
        """The direction of the one that acts."""
        return self._pick(param).update_reduced(low, state, param)

    def rotate(self, state: State, rotation: Tensor) -> None:
        """What is inside a basis has one shape and should not be told apart by it."""
        raise ValueError("a transform by shape cannot stand inside a projection; give the one for matrices.")

    def acting_on(self, param: Tensor) -> Transform:
        """That of the one that acts."""
        return self._pick(param).acting_on(param)

    @property
    def reads_param(self) -> bool:
        """Whether any of them does."""
        return self.matrix.reads_param or self.other.reads_param

    @property
    def constrains(self) -> bool:
        """Whether any of them does."""
        return self.matrix.constrains or self.other.constrains

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """The constraint of the one that acts."""
        return self._pick(param).constrain(param, state, lr, weight_decay)


def by_shape(*, matrix: Transform, other: Transform, above: int | float = 0) -> Transform:
    """Treat matrices (and convolutions) by one transform, and all else by another.

    Args:
        matrix: for matrices whose shorter side is larger than ``above``.
        other: for all other parameters.
        above: a number, or a share of the shorter side; what is projected to this rank would gain nothing.
    """
    return ByShape(matrix=matrix, other=other, above=above)
