"""What a method is: a frozen dataclass with one function of tensors."""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from ..matrices import StructuredMatrix
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
