"""Another transform in a subspace of the gradient."""

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.combining import by_shape
from ..core.directions import Direction, add_to, formed
from ..core.methods import check_finite
from ..core.seen import Entries, wide
from ..core.states import State
from ..core.subspaces import Carry, Projector, Refresh, Subspace, check_unread
from ..core.transforms import Transform
from ..projectors import Backoff, Every, Keep, Rotate
from ..projectors.bases import ChosenRows


class Rest(abc.ABC):
    """Makes a step of the part of a gradient that lies outside the subspace."""

    @property
    def removed(self) -> float:
        """Which part of what lies inside the subspace is taken from the gradient that ``update`` sees."""
        return 1.0

    def init(self, param: Tensor, index: Tensor) -> State:
        """Return what is remembered; see :meth:`Transform.init`."""
        return {}

    def lead(self, grad: Tensor, state: State) -> Tensor:
        """Return the gradient (k, s, l) that is projected; perhaps with what earlier ones have left."""
        return grad

    @abc.abstractmethod
    def update(self, rest: Tensor, low: Tensor, direction: Tensor, state: State) -> Tensor:
        """Return the direction (k, s, l) that is added, which may be of a smaller shape and is broadcast.

        Args:
            rest: (k, s, l) the gradient without what lies in the subspace.
            low: (k, r, l) the projected gradient.
            direction: (k, r, l) what the inner transform made of it.
            state: what ``init`` returned; written into.
        """


@dataclass(frozen=True, kw_only=True)
class Project(Transform):
    """Let a transform see r combinations of the rows of gradients (k, s, l), s <= l, and bring its step back.

    Args:
        subspace: which combinations.
        inner: sees (k, r, l).
        scale: of the step that comes back.
        rest: makes a step of what lies outside, or None to drop it.
    """

    subspace: Subspace
    inner: Transform
    scale: float = 1.0
    rest: Rest | None = None

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)

    def init(self, param: Tensor, index: Tensor) -> State:
        """The states of the parts."""
        rest = {"rest": self.rest.init(param, index)} if self.rest else {}
        return {**begin(self.subspace, self.inner, param, index), **rest}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, s, l) -> (k, s, l)."""
        return formed(self.update_unformed(grad, state, param))

    def update_unformed(self, grad: Tensor, state: State, param: Tensor) -> Direction:
        """(k, s, l) -> (k, s, l); a product where there is no rest."""
        if self.rest is not None:
            grad = self.rest.lead(grad, state["rest"])
        self.subspace.follow(grad, state["subspace"], self.inner, state["inner"])
        projector, basis = self.subspace.projector, state["subspace"]["basis"]
        low = projector.down(grad, basis)
        direction, step = self._inside(low, state)
        if self.rest is None:
            return step
        outside = add_to(grad.clone(), projector.lift(low, basis), factor=-self.rest.removed)
        return formed(step).add_(self.rest.update(outside, low, direction, state["rest"]))

    def reduce(self, grad: Tensor, state: State, param: Tensor) -> Tensor | None:
        """(k, s, l) -> (k, r, l), where the rest is dropped and the basis stays."""
        if self.rest is not None or not self.subspace.stays(state["subspace"]):
            return None
        return self.subspace.projector.down(grad, state["subspace"]["basis"])

    def update_reduced(self, low: Tensor, state: State, param: Tensor) -> Direction:
        """(k, r, l) -> (k, s, l)."""
        self.subspace.stay(state["subspace"])
        return self._inside(low, state)[1]

    def _inside(self, low: Tensor, state: State) -> tuple[Tensor, Direction]:
        """Return the direction inside the subspace, and the scaled step that comes back."""
        direction = self.inner.update(low, state["inner"], torch.empty_like(low, device="meta"))
        scaled = direction if self.scale == 1 else direction * self.scale
        return direction, self.subspace.projector.lift(scaled, state["subspace"]["basis"])


def begin(subspace: Subspace, inner: Transform, param: Tensor, index: Tensor) -> dict[str, State]:
    """Return the states of a subspace of parameters (k, s, l), and of what runs inside of it."""
    if inner.constrains:
        raise ValueError("what constrains weights cannot run inside a projection; chain it behind that.")
    check_unread(inner, "inside a projection")
    subspace.check(inner, param)
    return {"subspace": subspace.init(param, index), "inner": inner.init(subspace.blank(param), index)}


def project(
    projector: Projector,
    inner: Transform,
    *,
    rank: int | float,
    every: int | Refresh = 200,
    scale: float = 1.0,
    carry: Carry = Keep(),  # noqa: B008 (frozen)
    rest: Rest | None = None,
    entries: bool = False,
) -> Transform:
    """Run a transform on a low-rank projection of each gradient, so that its state is small.

    Vectors, and matrices whose shorter side is at most ``rank``, get the inner transform itself, unscaled: a
    projection would save nothing.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> from rankwise.optimizers import sgd
    >>> from rankwise.projectors import RandomRows
    >>> transform = project(RandomRows(), sgd(beta=0.9), rank=0.25)
    >>> state_bytes(transform, torch.zeros(40, 64)) < 0.3 * state_bytes(sgd(beta=0.9), torch.zeros(40, 64))
    True

    Args:
        projector: chooses the subspace.
        inner: sees the projected gradients.
        rank: the dimension of the subspace, or its share of the shorter side.
        every: steps between two choices of a parameter's subspace, or a rule.
        scale: of the projected step.
        carry: what becomes of the inner state when the subspace changes.
        rest: makes a step of what lies outside the subspace.
        entries: let ``RandomRows``, ``LargestRows`` or ``RowBlock`` choose single entries in place of rows, of
            which ``rank`` is the share then. The places of those that are chosen take four bytes each.

    Raises:
        ValueError: if entries cannot be chosen in this way.
    """
    refresh = every if isinstance(every, Refresh) else Every(every)
    subspace = Subspace(projector=projector, rank=rank, refresh=refresh, carry=carry)
    inside = Project(subspace=subspace, inner=inner, scale=scale, rest=rest)
    if entries:
        _check_entries(projector, rank, refresh, carry)
    return by_shape(matrix=Entries(inside) if entries else wide(inside), other=inner, above=rank)


def _check_entries(projector: Projector, rank: int | float, refresh: Refresh, carry: Carry) -> None:
    """Raise unless a subspace of single entries needs no matrix over all of them."""
    if not isinstance(projector, ChosenRows):
        raise ValueError(
            f"entries are chosen by RandomRows(), LargestRows() or RowBlock(), not by {type(projector).__name__}."
        )
    if not isinstance(rank, float):
        raise ValueError(f"of entries rank is a share from 0.0 to 1.0, got {rank!r}.")
    if isinstance(refresh, Backoff) or isinstance(carry, Rotate):
        raise ValueError("entries have no angles between them: use Every or EnergyDrop, and Keep or Reset.")
