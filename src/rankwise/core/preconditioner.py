"""What turns gradients into natural gradients, one block of layers at a time."""

import abc
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from .capture import Rows
from .states import described


@dataclass(frozen=True)
class Size:
    """What is known before training about the curvature of one layer.

    Args:
        shape: (m, n).
        tokens: whether the layer sees numbers of tokens.
        samples: N of a step.
        positions: of each sample, or as many as are known of.
        dtype: of samples and curvature.
    """

    shape: tuple[int, int]
    tokens: bool
    samples: int
    positions: int
    dtype: torch.dtype


Curvature = dict[str, Tensor]
"""What is remembered about a block: tensors, in float32 or float64; single numbers, of no axis, on the CPU."""
Damping = float | Callable[[int], float]
"""A number > 0, or such a number for each step."""


@dataclass(frozen=True)
class Shared:
    """What each process gives to all about a block.

    Args:
        sums: to be added up.
        rows: to be concatenated on the first axis, in the order of the processes.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)


class Preconditioner(abc.ABC):
    """Turns gradients V into (F + damping I)^-1 V, where F is some approximation of the Fisher matrix.

    F is the mean of u_k u_k' over the samples' gradients u_k, each of its own loss with the labels that are
    given: the empirical Fisher matrix. Where that loss is a mean over T positions, u_k is sqrt(T) times as long,
    which makes F that of the positions; see :meth:`Conditioning.step`.

    A method is a frozen dataclass. At some steps each process makes from what its layers saw what it has to
    share; this is exchanged, and each process brings its curvature up to date; then one process inverts and gives
    the result to the others; and at every step gradients are multiplied.
    Samples, sums and curvature are float32 or float64, as the gradients are, and what is stored belongs to the
    method alone. Only ``curvature`` may be written into.
    """

    damping: Damping
    forming: ClassVar[Collection[str] | None] = None
    """The fields that decide what the curvature looks like; None means all but ``damping`` and ``every``."""

    decisions: ClassVar[Set[str]] = frozenset()
    """What ``observe`` puts into the curvature and ``local`` goes by: that of the first process holds for all."""

    @abc.abstractmethod
    def captures(self, step: int) -> bool:
        """Whether step 0, 1, ... looks at the samples; what has no curvature yet is looked at in any case."""

    def inverts(self, step: int) -> bool:
        """Whether a step that looks at the samples also inverts, as the first look does in any case."""
        return True

    @property
    def sees_rows(self) -> bool:
        """Whether it looks at samples at all; else ``observe`` makes the curvature from gradients alone."""
        return True

    @property
    def reduces(self) -> bool:
        """Whether :func:`rankwise.linalg.reduced` samples will do, which need no patches of convolutions."""
        return False

    @property
    def whole(self) -> bool:
        """Whether all layers are one block; else each is one."""
        return False

    @property
    def projects(self) -> bool:
        """Whether ``local`` reads what ``invert`` returned, which all processes then need of all blocks."""
        return False

    def local(
        self, rows: Sequence[Rows], curvature: Curvature, generator: Generator, samples: int, damping: float
    ) -> Shared:
        """Return what this process has to say about the samples of a block.

        Args:
            rows: of each layer of the block. A process may have none of a layer's: ``len(each) == 0``.
            curvature: as it is, ``{}`` before the first call.
            generator: for what is drawn; other processes draw other numbers.
            samples: N of all processes.
            damping: of this step.
        """
        return Shared()

    def update(self, shared: Shared, samples: int, curvature: Curvature) -> None:  # noqa: B027 (nothing by default)
        """Bring the curvature up to date with what all processes said, all of them in the same way.

        Args:
            shared: after the exchange.
            samples: N of all processes.
            curvature: is written into.
        """

    def invert(self, curvature: Curvature, damping: float, shapes: Sequence[tuple[int, int]]) -> Curvature:
        """Return what makes multiplying cheap; it is put into the curvature under its names.

        Args:
            curvature: as ``update`` left it.
            damping: of this step. What is returned holds it where later steps are to use the same.
            shapes: (m, n) of the layers of the block.
        """
        return {}

    def observe(  # noqa: B027 (nothing by default)
        self, gradients: Sequence[Tensor], curvature: Curvature, damping: float
    ) -> None:
        """Take note of the gradients (m, n) of a block at each step, before they are multiplied."""

    @abc.abstractmethod
    def apply(self, gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> list[Tensor]:
        """Return the natural gradients (m, n) of a block; the given ones are not written into."""

    def state_bytes(self, sizes: Sequence[Size]) -> int:
        """Return how many bytes the curvature of a block of layers takes, or at least takes if more decides."""
        return 0

    def form(self) -> dict[str, Any]:
        """Return as plain data what a state must have in common with this method."""
        every = {each.name for each in fields(self)}  # pyright: ignore[reportArgumentType]
        names = every - {"damping", "every"} if self.forming is None else every.intersection(self.forming)
        return {"kind": type(self).__name__, **{name: described(getattr(self, name)) for name in sorted(names)}}

    def cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Return how much work it is to invert for a block of layers (m, n), in any unit."""
        return 1.0


def damping_at(damping: Damping, step: int) -> float:
    """Return the damping of a step.

    Raises:
        ValueError: if it is not a positive number.
    """
    found = damping(step) if callable(damping) else damping
    if not 0 < found < float("inf"):
        raise ValueError(f"damping must be a number > 0, got {found} at step {step}.")
    return float(found)


def every_step(every: int, name: str = "every") -> None:
    """Raise unless a period is a whole number >= 1."""
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {every!r}.")
