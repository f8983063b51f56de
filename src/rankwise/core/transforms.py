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

from .directions import Direction
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
