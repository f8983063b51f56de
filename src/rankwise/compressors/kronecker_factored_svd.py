"""Truncated SVD in the Kronecker-factored metric of the loss: the default."""

from dataclasses import dataclass

from .loss_metric import LossMetric
from .truncation import TruncatedSvd


@dataclass(frozen=True, kw_only=True)
class KroneckerFactoredSvd(LossMetric, TruncatedSvd):
    """Keep the r directions of W whose loss changes the model's loss most, 1/2 tr(S D C D').

    C = E[x x'] is the second moment of the inputs and S = E[g g'] that of the gradients of the loss by the
    outputs, as in K-FAC. The error is the second-order change of the loss in nats per token, so that layers can
    be weighed against each other under one budget.

    Args:
        input_shrinkage: how far C moves towards its own diagonal, in [0, 1). A calibration text shows only some
            of the directions that inputs take; this keeps the others from counting as free.
        input_damping: multiple of mean(diag C) added to C's diagonal.
        output_damping: multiple of mean(diag S) added to S's diagonal; larger, because gradients are noisier
            and, in the last layers, have few directions.
        gauge: how the result is stored: r rows or columns and how they make the others, or two factors.
        rank_multiple: offer only multiples of it, such as 16 or 32, for processors that prefer them.

    References: the metric is that of Martens and Grosse, "Optimizing neural networks with Kronecker-factored
        approximate curvature", 2015, arXiv 1503.05671. S = I gives :class:`WhitenedSvd`, C = S = I the plain SVD.
    """

    def __post_init__(self) -> None:
        TruncatedSvd.__post_init__(self)
        LossMetric.__post_init__(self)
