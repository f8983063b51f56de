"""A step with state in a subspace, and one without state on the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape, chain
from ..core.methods import check_finite
from ..core.states import State
from ..core.subspaces import Carry, Projector, Refresh, check_unread
from ..core.transforms import Transform
from ..projectors import RandomRows, Reset
from .adam import adam
from .project import Rest, project
from .sign import sign


@dataclass(frozen=True)
class Times(Transform):
    """Multiply directions by a number.

    Args:
        scale: the number.
    """

    scale: float

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)

    @property
    def elementwise(self) -> bool:
        """It is."""
        return True

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, ...) -> (k, ...)."""
        return grad * self.scale


@dataclass(frozen=True)
class Outside(Rest):
    """Treat the rest of a gradient by a transform of its own.

    Args:
        transform: of the rest.
    """

    transform: Transform

    def init(self, param: Tensor, index: Tensor) -> State:
        """The state of the transform."""
        check_unread(self.transform, "on the rest of a gradient")
        return self.transform.init(param, index)

    def update(self, rest: Tensor, low: Tensor, direction: Tensor, state: State) -> Tensor:
        """The step of the transform."""
        return self.transform.update(rest, state, torch.empty_like(rest, device="meta"))


def frugal(
    *,
    density: float = 0.25,
    every: int | Refresh = 200,
    projector: Projector = RandomRows(),  # noqa: B008 (frozen)
    inner: Transform = adam(),  # noqa: B008 (frozen)
    free: Transform = sign(),  # noqa: B008 (frozen)
    free_scale: float = 1.0,
    carry: Carry = Reset(),  # noqa: B008 (frozen)
    entries: bool = False,
) -> Transform:
    """FRUGAL: Adam in a small subspace that changes, and signs of the gradient, without state, outside of it.

    So the step has full rank. With density 0 matrices get ``free`` alone, with density 1 ``inner`` alone.

    >>> frugal(density=0.0).matrix
    Sign()

    Args:
        density: the share of the shorter side, or of the entries, that has a state.
        every: steps between two choices of a matrix's subspace, or a rule.
        projector: chooses the subspace.
        inner: what runs inside, and on vectors.
        free: what runs outside; it should have no state, and must not read the parameter.
        free_scale: of its steps; 0.1 where a model is fine-tuned.
        carry: what becomes of moments when the subspace changes; the published code begins them again.
        entries: let the projector choose single entries of a matrix in place of rows ("randk" there).

    References: Zmushko et al., 2025, arXiv 2411.07837. There inputs or outputs may be chosen; here always the
    shorter side. There all matrices change at the same step, here by turns. Whole tensors as blocks are not here,
    as a state that comes and goes with them is none of a fixed size; ``RowBlock()`` visits the rows of each.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density must be a share from 0 to 1, got {density}.")
    free = free if free_scale == 1 else chain(free, Times(free_scale))
    if density == 0:
        return by_shape(matrix=free, other=inner)
    return project(
        projector, inner, rank=float(density), every=every, carry=carry, rest=Outside(free), entries=entries
    )
