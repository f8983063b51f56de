"""Subspaces of gradients: how they are chosen and when, and what happens to the states inside them."""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .directions import Direction, formed
from .states import State, counter, map_state, put, take
from .transforms import Transform, check_rank, rank_of

Measure = Callable[[], Tensor]


class Projector(abc.ABC):
    """Chooses r directions of the rows of gradients, and goes there and back.

    A projector is a frozen dataclass. It sees gradients (k, s, l) whose rows are the shorter side, s <= l, and
    keeps in its state what describes an orthonormal basis of r columns: ``down(up(x)) == x``.
    """

    @abc.abstractmethod
    def init(self, grad: Tensor, rank: int, index: Tensor) -> State:
        """Return a state of the final shapes and types, before any gradient was seen.

        Args:
            grad: (k, s, l) of the shape, type and device of gradients, perhaps on the meta device.
            rank: 1 <= r < s.
            index: (k,) on the CPU, the places of the parameters among all; for seeds.
        """

    @abc.abstractmethod
    def fit(self, grad: Tensor, state: State, *, first: bool) -> State:
        """Return the state for new gradients; neither argument is written into.

        Args:
            grad: (k, s, l).
            state: the present one, from which a warm start may go on.
            first: whether it is as ``init`` made it.
        """

    @abc.abstractmethod
    def down(self, grad: Tensor, state: State) -> Tensor:
        """(k, s, any) -> (k, r, any)."""

    @abc.abstractmethod
    def lift(self, low: Tensor, state: State) -> Direction:
        """(k, r, any) -> (k, s, any), perhaps as a product."""

    def up(self, low: Tensor, state: State) -> Tensor:
        """(k, r, any) -> (k, s, any)."""
        return formed(self.lift(low, state))

    @abc.abstractmethod
    def rank(self, state: State) -> int:
        """Return r."""

    def rotation(self, old: State, new: State, like: Tensor) -> Tensor:
        """Return new basis' @ old basis (k, r, r), in the type and on the device of ``like`` (k, ...)."""
        r = self.rank(old)
        eye = torch.eye(r, dtype=like.dtype, device=like.device).expand(len(like), r, r)
        return self.down(self.up(eye, old), new)


class Refresh(abc.ABC):
    """Says when the basis of each parameter is fitted again. It is always fitted to the first gradient."""

    def init(self, index: Tensor) -> State:
        """Return what is remembered of each parameter; tensors (k,) on the CPU."""
        return {}

    @abc.abstractmethod
    def due(self, step: Tensor, state: State, share: Measure) -> Tensor:
        """Return whose basis is to be fitted now, bool (k,) on the CPU.

        Args:
            step: (k,) on the CPU, from one.
            state: what ``init`` returned; may be written into.
            share: measures which part of |gradient|^2 the present basis holds, (k,) on the CPU. This waits for a
                device, so it should not be called at each step.
        """

    def may_be_due(self, step: Tensor, state: State) -> bool:
        """Whether any basis may be fitted at a step, or the gradient be looked at; nothing is written into.

        Args:
            step: (k,) on the CPU, from one.
            state: what ``init`` returned.
        """
        return True

    def fitted(self, state: State, share: Measure, overlap: Measure) -> None:  # noqa: B027 (most need not look)
        """Look at what a fit has changed.

        Args:
            state: of the parameters that were fitted; may be written into.
            share: as for ``due``, with the new basis.
            overlap: measures which part of the new subspace the old one holds, beyond what a random one would:
                (k,) from 0 to 1 on the CPU. Of a first basis it means nothing.
        """


class Carry(abc.ABC):
    """Says what happens to the state inside a subspace when the basis changes."""

    @abc.abstractmethod
    def __call__(self, inner: Transform, state: State, rotation: Measure, low: Tensor) -> None:
        """Write the state for the new basis.

        Args:
            inner: what works inside the subspace.
            state: its state, of gradients (k, r, l).
            rotation: computes (k, r, r), from old to new coordinates.
            low: (k, r, l) of the shape and type of gradients there, without meaning.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
    """A projector with its rank, the rule when to fit it, and what becomes of states inside.

    It serves all transforms that work with a part of the gradient: they call ``follow`` once a step, and then
    ``projector.down`` and ``up`` with ``state["basis"]``.
    """

    projector: Projector
    rank: int | float
    refresh: Refresh
    carry: Carry
    exact: ClassVar[tuple[str, ...]] = ("basis",)  # see Transform

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if not self.rank > 0:
            raise ValueError(f"rank must be above zero, got {self.rank}.")

    def blank(self, param: Tensor) -> Tensor:
        """Return zeros of the shape of projected gradients, (k, r, l) for (k, s, l)."""
        return torch.zeros_like(param[:, : rank_of(self.rank, param.shape[-2])])  # in the same order in memory

    def init(self, param: Tensor, index: Tensor) -> State:
        """Return the state before the first gradient."""
        rank = rank_of(self.rank, param.shape[-2])
        return {
            "step": counter(index),
            "basis": self.projector.init(param, rank, index),
            "refresh": self.refresh.init(index),
        }

    def follow(self, grad: Tensor, state: State, inner: Transform, inside: State) -> None:
        """Fit the bases that are due to the gradient (k, s, l), and carry the states inside.

        A gradient of zeros, as experts have that no token reached, does not count as the first, and takes no
        basis away that was fitted to another.
        """
        step, basis = state["step"].add_(1), state["basis"]
        begin = step == 1
        due = self.refresh.due(step, state["refresh"], lambda: self.share(grad, basis)) | begin
        if not bool(due.any()):
            return
        empty = ~(grad != 0).any(-1).any(-1).cpu()
        step.sub_((begin & empty).to(step))
        due = due & ~empty
        for first, chosen in ((True, due & begin), (False, due & ~begin)):
            rows = chosen.nonzero().flatten()
            if len(rows) == len(due):  # all, nothing is copied
                self._fit(grad, state, inner, inside, first)
            elif len(rows):
                some, some_inside = take(state, rows), take(inside, rows)
                self._fit(grad[rows.to(grad.device)], some, inner, some_inside, first)
                put(state, rows, some)
                put(inside, rows, some_inside)

    def stays(self, state: State) -> bool:
        """Whether the next step goes without a new basis, whatever its gradient is."""
        step = state["step"] + 1
        return bool((step > 1).all()) and not self.refresh.may_be_due(step, state["refresh"])

    def stay(self, state: State) -> None:
        """Count a step without a new basis."""
        state["step"].add_(1)

    def _fit(self, grad: Tensor, state: State, inner: Transform, inside: State, first: bool) -> None:
        old = state["basis"]
        new = self.projector.fit(grad, old, first=first)

        def rotation() -> Tensor:
            return self.projector.rotation(old, new, grad)

        def overlap() -> Tensor:
            chance = self.projector.rank(new) / grad.shape[-2]
            held = rotation().square().sum((-2, -1)).cpu() / self.projector.rank(new)
            return ((held - chance) / (1 - chance)).clamp_min(0) if chance < 1 else held

        self.refresh.fitted(state["refresh"], lambda: self.share(grad, new), overlap)
        if not first:
            self.carry(inner, inside, rotation, self.blank(grad))
        map_state(lambda value, fresh: value.copy_(fresh), old, new)

    def share(self, grad: Tensor, basis: State) -> Tensor:
        """Return which part of |grad|^2 (k, s, l) a basis holds, (k,) on the CPU; of a zero gradient, all."""
        held = self.projector.down(grad, basis).square().sum((-2, -1))
        total = grad.square().sum((-2, -1))
        return torch.where(total > 0, held / total, torch.ones_like(total)).float().cpu()

    def check(self, inner: Transform, param: Tensor) -> None:
        """Raise ValueError if the state of an inner transform cannot be carried; tried without values."""
        low = self.blank(torch.empty_like(param, device="meta"))
        eye = low.new_empty(len(low), low.shape[-2], low.shape[-2])
        self.carry(inner, inner.init(low, torch.zeros(len(low), dtype=torch.int64)), lambda: eye, low)


def check_unread(transform: Transform, where: str) -> None:
    """Raise ValueError if a transform reads the values of parameters, which are not there, as in a projection."""
    if transform.reads_param:
        raise ValueError(
            f"{type(transform).__name__} reads the values of parameters, which it cannot {where}; take another "
            "one there."
        )
