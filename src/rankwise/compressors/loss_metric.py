"""What all methods share whose errors are changes of the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.methods import Compressor
from ..core.statistics import InputGram, OutputGradGram, Statistic, Stats
from ..linalg import Metric, metric_norm


@dataclass(frozen=True, kw_only=True)
class LossMetric(Compressor):
    """Measures a change D of a weight by the second-order change of the loss in nats per token, 1/2 tr(S D C D').

    C = E[x x'] is the second moment of the inputs and S = E[g g'] that of the gradients of the loss by the
    outputs, as in K-FAC. Errors so measured are comparable between layers and between methods.

    Args:
        input_shrinkage: how far C moves towards its own diagonal, in [0, 1). A calibration text shows only some
            of the directions that inputs take; this keeps the others from counting as free.
        input_damping: multiple of mean(diag C) added to C's diagonal.
        output_damping: multiple of mean(diag S) added to S's diagonal; larger, because gradients are noisier
            and, in the last layers, have few directions.

    References: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
        2015, arXiv 1503.05671.
    """

    input_shrinkage: float = 0.05  # benchmarks/damping.py shows what this and the damping of S do
    input_damping: float = 1e-6
    output_damping: float = 0.05
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputGram, OutputGradGram)
    comparable: ClassVar[bool] = True
    scale: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.input_shrinkage < 1:
            raise ValueError(f"input_shrinkage must be >= 0 and < 1, got {self.input_shrinkage}.")
        check_damping("input_damping", self.input_damping)
        check_damping("output_damping", self.output_damping)

    def metrics(self, stats: Stats) -> tuple[Metric, Metric]:
        """Return S (m, m) and the shrunk C (n, n), damped."""
        moment = stats[InputGram].value()
        shrunk = moment.lerp(moment.diagonal().diag(), self.input_shrinkage)
        outputs = Metric(stats[OutputGradGram].value(), self.output_damping)
        return outputs, Metric(shrunk, self.input_damping)

    def error_of(self, stats: Stats) -> Callable[[Tensor], float]:
        """Return what measures an (m, n) change of the weight, in nats per token."""
        return lambda change: self.scale * metric_norm(change, *self.metrics(stats))


def check_damping(name: str, value: float) -> None:
    """Raise unless a damping is a finite number >= 0."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}.")
