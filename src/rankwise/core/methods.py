"""What a method is: a frozen dataclass with one function of tensors."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from ..matrices import Base, StructuredMatrix
from .choices import Choices
from .statistics import Statistic, Stats


class Compressor(abc.ABC):
    """Offers structured matrices of several sizes for one weight.

    ``needs`` names the statistics it reads. ``comparable`` says that its errors mean the same in every
    layer, so that an allocator may weigh one layer against another. ``shifts`` says that its choices have a mean,
    so that layers may get a bias. ``layers`` says how many layers of one kind it is given as one weight, see
    :class:`~rankwise.core.together.Together`; it is then a field.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    comparable: ClassVar[bool] = False
    shifts: ClassVar[bool] = False
    layers: int = 1

    @abc.abstractmethod
    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Return the choices for an (m, n) weight."""

    def axis(self, m: int, n: int) -> int | None:
        """Say how (m, n) weights of layers stand in one: 0 below, 1 beside each other, None not at all."""
        return None

    def apart(self, matrix: StructuredMatrix) -> list[StructuredMatrix]:
        """Cut a matrix of ``layers`` layers, made by a choice, into theirs, which share what is stored once."""
        return [matrix]


class Adapter(abc.ABC):
    """Puts a few trained numbers beside a frozen matrix; the result is the same matrix at the start.

    An adapter is a frozen dataclass. If it has a ``rank``, ``ranks`` may give each layer its own, a multiple of
    ``step``. ``lr`` is the learning rate of AdamW that its class suggests, None where no published one is known.
    """

    step: ClassVar[int] = 1
    lr: ClassVar[float | None] = None

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics that it reads of each layer."""
        return ()

    @property
    def ranks(self) -> "RankRule | None":
        """What gives layers their ranks, or None if all get the same."""
        return None

    def largest(self, m: int, n: int) -> int:
        """Return the largest rank that a rule may give an (m, n) matrix.

        Raises:
            TooSmallError: if the shape is too small for any rank.
            ValueError: if the adapter does not fit the shape otherwise.
        """
        return min(m, n)

    def with_rank(self, rank: int) -> "Adapter":
        """The same with another rank; where alpha is divided by it, alpha grows as much."""
        method: Any = self
        alpha = getattr(method, "alpha", None)
        scaled = {} if alpha is None else {"alpha": alpha * rank / method.rank}
        return dataclasses.replace(method, rank=rank, **scaled)

    @abc.abstractmethod
    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return an expression that contains ``base``; its parameters outside ``base`` and ``Frozen`` train.

        Raises:
            TooSmallError: if the shape is too small for the adapter.
            ValueError: if the adapter does not fit the shape otherwise, or a statistic is not what it needs.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked(Adapter):
    """An adapter of a rank that any rule may spread over layers.

    Args:
        ranks: from :mod:`rankwise.rank_rules`; ``rank`` is then the average. None gives all layers the same.
    """

    ranks: "RankRule | None" = None  # pyright: ignore[reportIncompatibleMethodOverride] (a field is a property)

    def __post_init__(self) -> None:
        if self.ranks is None:
            return
        if not isinstance(self.ranks, RankRule):
            raise TypeError(f"ranks must be an object from rankwise.rank_rules, got {self.ranks!r}.")
        if getattr(self, "rank", None) is None:
            raise ValueError("ranks spreads the ranks of layers, whose average is rank; give it.")


class BlockAdapter(abc.ABC):
    """Puts small modules behind layers, which may be non-linear and cannot be folded into a weight.

    An adapter is a frozen dataclass. ``last`` says that only the last part of each block gets one, and ``lr`` is
    as in :class:`Adapter`.
    """

    lr: ClassVar[float | None] = None
    last: bool

    @abc.abstractmethod
    def modules(self, outputs: Mapping[str, Tensor], generator: Generator) -> Mapping[str, nn.Module]:
        """Return for each layer a module that takes its outputs and changes nothing at the start.

        Args:
            outputs: for each layer an empty-valued vector of the length, type and device of its outputs.
            generator: for all random numbers.

        Raises:
            ValueError: if a width does not fit.
        """


class Initialiser(abc.ABC):
    """Says where a low-rank update begins."""

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics that it reads of each layer."""
        return ()

    def largest(self, m: int, n: int) -> int:
        """Return the largest rank of which it can start an update of an (m, n) matrix."""
        return min(m, n)

    @abc.abstractmethod
    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the first left (m, r) and right (r, n) factor of an update that counts ``scale`` times.

        They are float32 or float64, on the device of the base. Where their product is not zero, it is taken off
        again, so that the sum starts as the base.

        Raises:
            TooSmallError: if the rank is above :meth:`largest`.
            ValueError: if a statistic is not what it needs.
        """


class RankRule(abc.ABC):
    """Says what ranks are worth to a layer, so that they can be spread over layers.

    Args:
        most: the largest rank of a layer, as a multiple of the average.
    """

    most: float

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics that it reads of each layer."""
        return ()

    @abc.abstractmethod
    def missed(self, base: StructuredMatrix, stats: Stats, count: int) -> Tensor:
        """Return (count + 1,) what ranks 0 ... count leave undone, never increasing, in units layers share."""


State = dict[str, dict[str, Tensor]]  # of each layer, by name


@dataclasses.dataclass
class Course:
    """One training of the matrices that share a schedule.

    Args:
        schedule: what acts.
        matrices: by layer name.
        optimizer: trains them.
        steps: how many steps there will be.
        done: how many steps there were.
        state: all else that a schedule remembers between steps.
    """

    schedule: "Schedule"
    matrices: Mapping[str, StructuredMatrix]
    optimizer: torch.optim.Optimizer
    steps: int
    done: int = 0
    state: State = dataclasses.field(default_factory=dict)


class Schedule(abc.ABC):
    """Acts on trained matrices around each step of an optimiser, on all that share its settings together.

    A schedule is a frozen dataclass of plain numbers, so that a saved matrix can name it. What it remembers is in
    ``course.state``; all that it does follows from that, ``course.done`` and ``course.steps``, so that it can be
    resumed.
    """

    @classmethod
    def of(cls, settings: object) -> Self:
        """Take the fields from something that has them all, such as the adapter that is to follow it."""
        kind: Any = cls
        return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)})

    @abc.abstractmethod
    def check(self, matrix: StructuredMatrix) -> None:
        """Raise ValueError unless this is a form of matrix that it can act on."""

    def before(self, course: Course) -> None:  # noqa: B027 (most need not do it)
        """Act when gradients are there and no number has moved; ``course.done`` does not count this step."""

    def after(self, course: Course) -> None:  # noqa: B027 (most need not do it)
        """Act when numbers have moved; ``course.done`` counts this step."""

    def settle(self, course: Course) -> None:  # noqa: B027 (most need not do it)
        """Say what trains now: called at the start, after each step, and when a state was loaded.

        At the start it changes no number: the model may be one whose training is taken up again.
        """

    def needed(self, steps: int) -> int:
        """Return after how many of the steps a matrix is what the settings ask for."""
        return 0

    def finished(self, matrix: StructuredMatrix) -> StructuredMatrix | None:
        """Return what stays of a matrix when training is over, or None if nothing does."""
        return matrix

    def data(self) -> dict[str, Any]:
        """Its name and fields, for :class:`~rankwise.matrices.Scheduled`."""
        fields: Any = self
        return {"kind": type(self).__name__, **dataclasses.asdict(fields)}


def check_function(name: str, value: object, instead: str) -> None:
    """Raise unless an argument is a function or None; ``instead`` says what to give."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be {instead}, or None, got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Raise unless a field is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def check_seed(name: str, value: int) -> None:
    """Raise unless a generator can be seeded with a number."""
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a whole number of at most 18 digits, got {value}.")


def check_finite(name: str, value: float) -> None:
    """Raise unless a field is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}.")


def check_most(most: float) -> None:
    """Raise unless a layer may have the average rank."""
    if not most >= 1:
        raise ValueError(f"most must be >= 1, got {most}.")


class Measure(abc.ABC):
    """Says something about one weight in a few numbers."""

    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    @abc.abstractmethod
    def __call__(self, weight: Tensor, stats: Stats) -> dict[str, float | None]:
        """Measure an (m, n) weight; a number that is not defined is None."""


class Start(abc.ABC):
    """Makes the structured matrix with which the training of a layer begins."""

    @abc.abstractmethod
    def matrix(self, m: int, n: int, generator: Generator) -> StructuredMatrix:
        """Return a random (m, n) matrix in float32, drawn from the generator alone."""

    def of(self, weight: Tensor, generator: Generator) -> StructuredMatrix:
        """Return the matrix that replaces a weight (m, n), whose values few starts take."""
        return self.matrix(weight.shape[0], weight.shape[1], generator)
