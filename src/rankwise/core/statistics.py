"""Running sums about the inputs and output gradients of layers, all filled by one pass over the data."""

import abc
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import CalibrationError

Batch = Tensor | Sequence[Any] | Mapping[str, Any]


class Statistic(abc.ABC):
    """A running sum about one layer, in float32, and how many rows went into it.

    Args:
        m: length of an output row.
        n: length of an input row.
        device: where the sum lives.
    """

    side: ClassVar[str]  # "input": rows of inputs alone; "output": gradients alone; "both"
    labelled: ClassVar[bool] = False  # whether it says nothing where labels are drawn from the model
    answers: ClassVar[bool] = False  # whether tokens that are given without a label do not count

    def __init__(self, m: int, n: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(self.sizes(m, n), dtype=torch.float32, device=device)
        self.count = 0

    @staticmethod
    @abc.abstractmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """Shape of the sum."""

    @abc.abstractmethod
    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the rows x (t, n) and grad (t, m), both float32; a side that is not used is empty."""

    def begin(self, number: int) -> None:  # noqa: B027 (most need not know)
        """Take note that batch 0, 1, ... begins."""

    def update(self, x: Tensor | None, grad: Tensor | None = None) -> None:
        """Add rows of inputs (t, n) and of output gradients (t, m)."""
        given = [rows for rows in (x, grad) if rows is not None]
        empty = self.sum.new_empty(0)
        self.add(empty if x is None else x.float(), empty if grad is None else grad.float())
        self.count += len(given[0])

    @property
    def size(self) -> float:
        """How large the rows are, for a statistic that can be put together for several layers."""
        raise self._of_one_layer()

    @classmethod
    def pooled(cls, layers: Sequence["Statistic"]) -> "Statistic":
        """Return what would have been collected of the rows of all layers.

        Raises:
            CalibrationError: if this statistic cannot be put together.
        """
        raise cls._of_one_layer()

    @classmethod
    def blocks(cls, layers: Sequence["Statistic"], scales: Sequence[float]) -> "Statistic":
        """Return what was collected of each layer, times a scale, as that of features of its own.

        Raises:
            CalibrationError: if this statistic cannot be put together.
        """
        raise cls._of_one_layer()

    @classmethod
    def _of_one_layer(cls) -> CalibrationError:
        return CalibrationError(f"{cls.__name__} cannot be put together for several layers; give layers=1.")

    def value(self) -> Tensor:
        """Return the mean over the rows, in float64.

        Raises:
            CalibrationError: if there were none.
        """
        if self.count == 0:
            raise CalibrationError("no calibration row reached this layer; give more or other data.")
        return self.sum.double() / self.count


Stats = Mapping[type[Statistic], Statistic]


def of_gradients(stats: Stats) -> list[Statistic]:
    """Return the statistics that gradients are part of."""
    return [statistic for need, statistic in stats.items() if need.side != "input"]


def divide_alike(layers: Iterable[Stats], rows: int | None = None) -> None:
    """Let the statistics of gradients be divided by one number in all layers.

    Args:
        layers: the statistics of each.
        rows: that number; None means the rows of the median layer.
    """
    found = [statistic for stats in layers for statistic in of_gradients(stats)]
    rows = rows or (median_low(statistic.count for statistic in found) if found else 0)
    for statistic in found:
        statistic.count = rows


class _Gram(Statistic):
    """A second moment; only the lower block triangle is summed."""

    block: ClassVar[int] = 384

    def _add(self, rows: Tensor) -> None:
        for low in range(0, rows.shape[1], self.block):
            high = min(low + self.block, rows.shape[1])
            self.sum[low:high, :high].addmm_(rows[:, low:high].mT, rows[:, :high])

    @property
    def size(self) -> float:
        """The mean squared length of a row."""
        return float(self.sum.diagonal().double().sum()) / max(self.count, 1)

    @classmethod
    def pooled(cls, layers: Sequence[Statistic]) -> Statistic:
        """The second moment of all rows."""
        whole = copy.copy(layers[0])
        whole.sum = torch.stack([layer.sum for layer in layers]).sum(0)
        whole.count = sum(layer.count for layer in layers)
        return whole

    @classmethod
    def blocks(cls, layers: Sequence[Statistic], scales: Sequence[float]) -> Statistic:
        """The second moments along the diagonal."""
        whole = copy.copy(layers[0])
        whole.count = min(layer.count for layer in layers)
        factors = [scale * whole.count / max(each.count, 1) for each, scale in zip(layers, scales, strict=True)]
        whole.sum = torch.block_diag(*[each.sum * factor for each, factor in zip(layers, factors, strict=True)])
        return whole

    def value(self) -> Tensor:
        """Return the symmetric second moment, in float64."""
        lower = super().value().tril()
        return lower + lower.tril(-1).mT


class InputGram(_Gram):
    """C = E[x x'], (n, n), not centred."""

    side = "input"

    @staticmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """(n, n)."""
        return n, n

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add x' x."""
        self._add(x)


class OutputGradGram(_Gram):
    """S = E[g g'], (m, m), with g the gradient of the summed loss by an output row."""

    side = "output"

    @staticmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """(m, m)."""
        return m, m

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add g' g."""
        self._add(grad)


class InputMean(Statistic):
    """E[x], (n,)."""

    side = "input"

    @staticmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """(n,)."""
        return (n,)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the rows."""
        self.sum += x.sum(0)


class AnswerGram(InputGram):
    """:class:`InputGram` of the tokens that have a label, or of all where no labels are given."""

    answers = True


class AnswerMean(InputMean):
    """:class:`InputMean` of the tokens that have a label, or of all where no labels are given."""

    answers = True


class InputMagnitude(Statistic):
    """E|x|, (n,), feature by feature."""

    side = "input"

    @staticmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """(n,)."""
        return (n,)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the absolute rows."""
        self.sum += x.abs().sum(0)


class GradientWeightedInput(Statistic):
    """E[|g|^2 x_j^2], (n,): the diagonal Fisher information of the weight, summed over outputs."""

    side = "both"

    @staticmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """(n,)."""
        return (n,)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the squared inputs, weighted by the squared norm of the gradient."""
        self.sum += grad.square().sum(1) @ x.square()


class WeightGradient(Statistic):
    """E[g x'], (m, n): the gradient of the mean loss by the weight.

    With labels drawn from the model itself it is zero in expectation, so that it takes those of the data.
    """

    side = "both"
    labelled = True

    @staticmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """(m, n)."""
        return m, n

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add g' x."""
        self.sum.addmm_(grad.mT, x)


class BatchGradients(Statistic):
    """The gradients by the weight of each batch's summed loss, (k, m, n): as many copies of it as batches."""

    side = "both"

    def __init__(self, m: int, n: int, device: torch.device | str = "cpu") -> None:
        super().__init__(m, n, device)
        self.room = self.sum  # of which the sum is the first part

    @staticmethod
    def sizes(m: int, n: int) -> tuple[int, ...]:
        """(0, m, n): there is no batch yet."""
        return 0, m, n

    def begin(self, number: int) -> None:
        """Make room for the gradient of batch ``number``, and of those that did not reach the layer."""
        if number >= len(self.room):
            room = self.room.new_zeros(max(number + 1, 2 * len(self.room)), *self.room.shape[1:])
            room[: len(self.sum)] = self.sum
            self.room = room
        self.sum = self.room[: number + 1]

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add g' x to the gradient of the batch, which may come in several calls."""
        if not len(self.sum):
            self.begin(0)
        self.sum[-1].addmm_(grad.mT, x)

    def value(self) -> Tensor:
        """Return the gradients (k, m, n), in float64."""
        super().value()  # raises
        return self.sum.double()


@dataclass(frozen=True)
class Statistics:
    """What one pass over the data found.

    Args:
        layers: the statistics of each layer; layers with the same input share one object. A matrix of a stack,
            such as an expert's, that no row reached has none.
        seconds: duration of the pass.
        peak_memory_bytes: the largest memory of the process up to its end.
        batches: the data, where it was kept.
    """

    layers: Mapping[str, Stats]
    seconds: float
    peak_memory_bytes: int
    batches: Sequence[Batch] = ()

    def of(self, name: str, needs: Iterable[type[Statistic]]) -> Stats:
        """Return what a method needs about a layer.

        Raises:
            CalibrationError: if the pass did not collect it.
        """
        have = self.layers.get(name, {})
        if self.unreached(name):
            raise CalibrationError(f"layer {name} was never reached by the data; leave it out with 'where'.")
        for need in needs:
            if need not in have:
                raise CalibrationError(
                    f"layer {name}: {need.__name__} was not collected; collect it for this method."
                )
        return have

    def unreached(self, name: str) -> bool:
        """Whether a layer was watched and no row, or no gradient, reached it."""
        return name in self.layers and not self.layers[name]
