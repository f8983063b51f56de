"""What all methods share whose errors are quadratic in the change of the weight."""

import abc
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from ..core.methods import Compressor
from ..core.statistics import Stats
from ..linalg import Metric, metric_norm


class QuadraticError(Compressor):
    """Measures a change D of a weight by ``scale`` * tr(S D C D')."""

    scale: ClassVar[float] = 1.0

    @abc.abstractmethod
    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """Return S (m, m) and C (n, n), made anew on every call: no layer keeps its own."""

    def error_of(self, stats: Stats) -> Callable[[Tensor], float]:
        """Return what measures an (m, n) change of the weight."""
        return lambda change: self.scale * metric_norm(change, *self.metrics(stats))


def check_damping(name: str, value: float) -> None:
    """Raise unless a damping is a finite number >= 0."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}.")
