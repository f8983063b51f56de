"""What all truncated SVDs share: a metric on each side, and a gauge to store the result in."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..core.choices import Choices
from ..linalg import Metric, metric_norm, metric_svd, truncated_factors
from ..matrices import LowRank, PivotedLowRank, StructuredMatrix

Gauge = Literal["pivot", "factors"]
Metrics = Callable[[], tuple[Metric, Metric]]
GAUGES: dict[Gauge, type[LowRank] | type[PivotedLowRank]] = {"pivot": PivotedLowRank, "factors": LowRank}


def check_gauge(gauge: str) -> None:
    """Raise unless the gauge is known."""
    if gauge not in GAUGES:
        raise ValueError(f"gauge must be one of {', '.join(GAUGES)}, got {gauge!r}.")


def check_damping(name: str, value: float) -> None:
    """Raise unless a damping is a finite number >= 0."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}.")


def truncations(weight: Tensor, metrics: Metrics, gauge: Gauge, scale: float = 1.0) -> Choices:
    """Offer the best matrix of every rank in the metric scale * tr(S D C D').

    Args:
        weight: (m, n).
        metrics: makes S (m, m) and C (n, n); called again when they are needed, so that no layer keeps its
            own while the other layers are decomposed.
        gauge: how a low-rank matrix is stored.
        scale: turns the metric into the units of the errors.
    """
    m, n = weight.shape
    u, s = metric_svd(weight, *metrics())
    u = u.to(torch.promote_types(weight.dtype, torch.float32))
    energy = scale * s.square()
    errors = torch.cat([energy.flip(0).cumsum(0).flip(0)[1:], energy.new_zeros(1)])  # what rank r leaves out
    kind = GAUGES[gauge]
    floats, indices = kind.stored(m, n, torch.arange(1, len(s) + 1))

    def build(i: int) -> StructuredMatrix:
        matrix = kind.from_factors(*truncated_factors(weight, metrics()[0], u[:, : i + 1]))
        return matrix.to(weight.dtype)

    return Choices(
        costs={
            "params": floats + indices,
            "bytes": floats * weight.element_size() + 4 * indices,
            "macs": floats,
        },
        errors=errors.cpu(),
        total=float(energy.sum()),
        build=build,
        error_of=lambda change: scale * metric_norm(change, *metrics()),
        spectrum=energy.sqrt().cpu(),
    )
