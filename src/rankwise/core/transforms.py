"""What an optimiser is made of: transforms of gradients, which are frozen dataclasses of plain functions.

All tensors have a leading axis of parameters, so that parameters of one shape are stepped together:
matrices (k, m, n), vectors (k, n), scalars (k,). Convolutions are seen as matrices (k, out, rest).
"""

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .directions import Direction, formed
from .states import State, leaves


class Transform(abc.ABC):
    """Turns gradients into the directions of steps: ``param -= lr * direction``.

    A transform is a frozen dataclass whose fields are plain values or such dataclasses. What it remembers is in
    its state, whose tensors ``update`` writes into; entries are never added or replaced. Gradients, and all
    states that are not declared otherwise, are float32 or float64, also where parameters have half precision.
    """

    exact: ClassVar[tuple[str, ...]] = ()
    """Entries of its own state that are never kept in few bits: their errors are no small errors of a step."""

    def init(self, param: Tensor, index: Tensor) -> State:
        """Return the state before the first step.

        Shapes and types follow from ``param`` alone: it may be on the meta device, where states are counted.
        Counters (see :func:`counter`) stay on the CPU, so that reading them never waits for a device.

        Args:
            param: (k, ...) the parameters, of the type of gradients. Their values may be read if ``reads_param``
                and they are not on the meta device; else they may be anything.
            index: (k,) on the CPU, the places of the parameters among all; for seeds and for taking turns.
        """
        return {}

    @abc.abstractmethod
    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """Return the direction (k, ...) of a step, and write the state.

        Neither ``grad`` nor ``param`` is written into. What is returned may be one of them, or a tensor of the
        state, so the caller must not write into it.

        Args:
            grad: (k, ...) gradients, finite; perhaps not contiguous, as matrices may be transposed.
            state: what ``init`` returned, and earlier steps have written into.
            param: (k, ...) the parameters, in their own type, if ``reads_param``. Else, and inside a subspace,
                it is on the meta device: it has a shape, and reading its values raises.
        """

    def update_unformed(self, grad: Tensor, state: State, param: Tensor) -> Direction:
        """Do what ``update`` does, and return the direction as a product where it is one that is not formed yet.

        Args:
            grad: as for ``update``.
            state: as for ``update``.
            param: as for ``update``.
        """
        return self.update(grad, state, param)

    def reduce(self, grad: Tensor, state: State, param: Tensor) -> Tensor | None:
        """Return a smaller, linear form of a gradient that the next step can be taken from, or None.

        Forms of several gradients may be added up, and their sum given to ``update_reduced``, so that a sum of
        gradients is never held whole. Nothing is written into, so that all gradients before the next step get the
        same form. None says that this step needs the whole gradient: always, or because a basis is due.

        Args:
            grad: as for ``update``.
            state: as for ``update``.
            param: as for ``update``.
        """
        return None

    def update_reduced(self, low: Tensor, state: State, param: Tensor) -> Direction:
        """Return what ``update_unformed`` would of the gradients whose reduced forms were added up.

        Args:
            low: a sum of what ``reduce`` returned.
            state: as for ``update``.
            param: as for ``update``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not reduce gradients.")

    def rotate(self, state: State, rotation: Tensor) -> None:
        """Carry a state to new coordinates, rows x -> rotation @ x.

        Args:
            state: of gradients (k, r, l), written into.
            rotation: (k, r, r), orthogonal where the old and the new basis span the same space, else shrinking.

        Raises:
            ValueError: if the state has no such form.
        """
        if leaves(state):
            raise ValueError(
                f"the state of {type(self).__name__} cannot be carried to another basis; choose carry=Keep() "
                "or carry=Reset()."
            )

    def shaped(self, param: Tensor) -> Tensor:
        """Return parameters (k, ...), or their gradients, in the shape in which ``update`` is to see them."""
        return as_matrices(param)

    def acting_on(self, param: Tensor) -> "Transform":
        """Return the transform that acts on parameters (k, ...) of this shape, with the same state."""
        return self

    @property
    def elementwise(self) -> bool:
        """Whether each number is stepped by its own gradients alone, so that parts can be stepped apart."""
        return False

    @property
    def reads_param(self) -> bool:
        """Whether ``update`` reads the values of parameters, which stacking copies."""
        return False

    @property
    def constrains(self) -> bool:
        """Whether ``constrain`` does anything."""
        return False

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """Return what the parameters (k, ...) become when a step has been taken, in the type of gradients."""
        return param


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


def rank_of(rank: int | float, side: int) -> int:
    """Return a rank for a side: the number itself, or a share of the side, at least one if above zero.

    >>> rank_of(4, 10), rank_of(0.25, 10), rank_of(0.01, 10), rank_of(20, 10)
    (4, 2, 1, 10)
    """
    wanted = rank if isinstance(rank, int) else max(round(rank * side), int(rank > 0))
    return min(wanted, side)


def check_rank(rank: int | float, *, name: str = "rank") -> None:
    """Raise unless it is a whole number, or a share of a side."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0
    if not whole and not (isinstance(rank, float) and 0 <= rank <= 1):
        raise ValueError(f"{name} must be an integer >= 0, or a share of the side from 0.0 to 1.0, got {rank!r}.")


def state_bytes(transform: Transform, *params: Tensor) -> int:
    """Count the bytes that the states of parameters will take, without making them.

    >>> from rankwise.optimizers import adam, galore
    >>> weight = torch.empty(64, 256, device="meta")
    >>> state_bytes(adam(), weight), state_bytes(galore(rank=8), weight)
    (131080, 18464)
    """
    alike = Counter((param.shape, param.dtype) for param in params if param.numel())
    like = [(torch.empty(shape, dtype=dtype, device="meta"), k) for (shape, dtype), k in alike.items()]
    return sum(k * leaf.nbytes for param, k in like for leaf in leaves(blank_state(transform, param)))


def blank_state(transform: Transform, param: Tensor) -> State:
    """Return a parameter's first state (1, ...) on the meta device, of the true one's shapes and types."""
    seen = transform.shaped(param.unsqueeze(0))
    like = torch.empty_like(seen, dtype=working_type(param.dtype), device="meta")  # in the same order in memory
    return transform.init(like, torch.zeros(1, dtype=torch.int64))


def working_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which steps are computed: the parameter's, or float32 if that is shorter."""
    return torch.promote_types(dtype, torch.float32)


def within(value: Any) -> Iterator[Any]:
    """What stands in the fields of a transform, at any depth: transforms, and other dataclasses."""
    parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    for part in [each for found in parts for each in (found if isinstance(found, tuple) else (found,))]:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            yield part
            yield from within(part)


def as_matrices(values: Tensor) -> Tensor:
    """(k, out, ...) -> (k, out, rest), a view where that is possible; vectors and scalars stay."""
    return values.flatten(2) if values.ndim > 3 else values


def _is_tall(values: Tensor) -> bool:
    return values.shape[-2] > values.shape[-1]
