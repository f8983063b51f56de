"""What a method is: a frozen dataclass with one function of tensors."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from ..matrices import Base, StructuredMatrix
from .choices import Choices
from .statistics import Statistic, Statistics, Stats


class Compressor(abc.ABC):
    """Offers structured matrices of several sizes for one weight.

    ``needs`` names the statistics it reads. ``comparable`` says that its errors mean the same in every
    layer, so that an allocator may weigh one layer against another. ``shifts`` says that its choices have a mean,
    so that layers may get a bias.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    comparable: ClassVar[bool] = False
    shifts: ClassVar[bool] = False

    @abc.abstractmethod
    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Return the choices for an (m, n) weight."""


class Adapter(abc.ABC):
    """Puts a few trained numbers beside a frozen matrix; the result is the same matrix at the start.

    An adapter is a frozen dataclass. If it has a ``rank``, ``ranks`` may give each layer its own.
    """

    @property
    def needs(self) -> tuple[type[Statistic], ...]:
        """The statistics that it reads of each layer."""
        return ()

    @property
    def ranks(self) -> "RankRule | None":
        """What gives layers their ranks, or None if all get the same."""
        return None

    def with_rank(self, rank: int) -> "Adapter":
        """The same adapter with another rank."""
        method: Any = self
        return dataclasses.replace(method, rank=rank)

    @abc.abstractmethod
    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        """Return an expression that contains ``base``; its parameters outside ``base`` and ``Frozen`` train.

        Raises:
            ValueError: if the adapter does not fit the shape, or a statistic is not what it needs.
        """


class BlockAdapter(abc.ABC):
    """Puts small modules behind layers, which may be non-linear and cannot be folded into a weight.

    An adapter is a frozen dataclass. ``last`` says that only the last part of each block gets one.
    """

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

    @abc.abstractmethod
    def factors(
        self, base: StructuredMatrix, rank: int, scale: float, stats: Stats, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the first left (m, r) and right (r, n) factor of an update that counts ``scale`` times.

        They are float32 or float64, on the device of the base. Where their product is not zero, it is taken off
        again, so that the sum starts as the base.
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


class Measure(abc.ABC):
    """Says something about one weight in a few numbers."""

    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    @abc.abstractmethod
    def __call__(self, weight: Tensor, stats: Stats) -> dict[str, float | None]:
        """Measure an (m, n) weight; a number that is not defined is None."""


class Preconditioner(abc.ABC):
    """Turns gradients into steps: makes the optimiser that trains structured matrices.

    ``needs`` names the statistics that it reads of each layer.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    @abc.abstractmethod
    def optimizer(
        self,
        matrices: Mapping[str, StructuredMatrix],
        biases: Mapping[str, nn.Parameter],
        others: Sequence[nn.Parameter],
        statistics: Statistics,
    ) -> torch.optim.Optimizer:
        """Return an optimiser over all parameters of the matrices, their layers' biases, and the others.

        Matrices and biases come by layer name, and so do the statistics.
        """


class Start(abc.ABC):
    """Makes the structured matrix with which the training of a layer begins."""

    @abc.abstractmethod
    def matrix(self, m: int, n: int, generator: Generator) -> StructuredMatrix:
        """Return a random (m, n) matrix in float32, drawn from the generator alone."""
