"""What all methods share whose errors are changes of the loss."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.statistics import InputGram, OutputGradGram, Statistic, Stats
from ..linalg import Metric
from .quadratic import QuadraticError, check_damping

LARGE = 65536  # numbers; of larger weights some choices are fitted, and the errors of the others predicted


@dataclass(frozen=True, kw_only=True)
class Regularisers:
    """How second moments, estimated from few rows, become the metrics of a change of the loss.

    Args:
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.
    """

    input_shrinkage: float = 0.05  # benchmarks/damping.py shows what this and the damping of S do
    input_damping: float = 1e-6
    output_damping: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.input_shrinkage < 1:
            raise ValueError(f"input_shrinkage must be >= 0 and < 1, got {self.input_shrinkage}.")
        check_damping("input_damping", self.input_damping)
        check_damping("output_damping", self.output_damping)

    def regularised(self, outputs: Tensor, inputs: Tensor) -> tuple[Metric, Metric]:
        """Return S (m, m) and the shrunk C (n, n), damped."""
        shrunk = inputs.lerp(inputs.diagonal().diag(), self.input_shrinkage)
        return Metric(outputs, self.output_damping), Metric(shrunk, self.input_damping)


@dataclass(frozen=True, kw_only=True)
class LossMetric(Regularisers, QuadraticError):
    """Measures a change D of a weight by the second-order change of the loss in nats per token, 1/2 tr(S D C D').

    Errors so measured are comparable between layers and between methods.

    References: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
        2015, arXiv 1503.05671.
    """

    needs: ClassVar[tuple[type[Statistic], ...]] = (InputGram, OutputGradGram)
    comparable: ClassVar[bool] = True
    scale: ClassVar[float] = 0.5

    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """Return S (m, m) and the shrunk C (n, n), damped."""
        return self.regularised(stats[OutputGradGram].value(), stats[InputGram].value())
