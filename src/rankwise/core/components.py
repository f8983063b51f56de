"""The principal components of what a layer is given."""

from torch import Tensor

from ..linalg import principal_components
from .statistics import AnswerGram, AnswerMean, InputGram, InputMean, Statistic, Stats

Needs = tuple[type[Statistic], ...]


def needed(centred: bool, answers: bool) -> Needs:
    """Return the statistics: the second moment, and the mean where it is taken off.

    Args:
        centred: take the mean off.
        answers: leave out tokens that are given without a label.
    """
    gram, mean = (AnswerGram, AnswerMean) if answers else (InputGram, InputMean)
    return (gram, mean) if centred else (gram,)


def input_components(stats: Stats, needs: Needs) -> tuple[Tensor, Tensor]:
    """Return the variances (n,) and components (n, n) of :func:`~rankwise.linalg.principal_components`.

    Args:
        stats: of the layer.
        needs: from :func:`needed`.

    Raises:
        ValueError: if nothing varies.
    """
    return principal_components(*(stats[need].value() for need in needs))
