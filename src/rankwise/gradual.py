"""Pruning in several rounds, each with new statistics of what is left."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .api import compress
from .core.methods import Compressor, check_count
from .core.report import Report
from .core.statistics import Statistics
from .core.surgery import fold, structured


def compress_gradually(
    model: nn.Module,
    method: Compressor,
    *,
    keep: float,
    rounds: int = 16,
    between: Callable[[nn.Module], object] | None = None,
    **options: Any,
) -> Report:
    """Compress a model in rounds of equal factors, in place: to keep^(1/rounds), keep^(2/rounds), ... and keep.

    After each round but the last the new matrices are written out, and the next one collects statistics of the
    model as it is then. So it is for methods that leave zeros alone, such as
    :class:`rankwise.compressors.MFacPruning`, whose curvature holds near the weights that it was taken at. An
    error leaves the model as the round before left it.

    Args:
        model: as for :func:`rankwise.compress`.
        method: as there.
        keep: as there, of the size of the whole model as it was given; 0 < keep < 1.
        rounds: how often statistics are collected.
        between: called with the ordinary model after each round but the last, such as to train it; it must leave
            zeros zero. Weights are new parameters in each round, and train: make an optimiser inside.
        options: of :func:`rankwise.compress`, such as ``data``, batches that can be read again, and ``of``.

    Returns:
        the report of the last round, whose errors are those of that round.

    Raises:
        ValueError: if an argument is wrong, or data are statistics, which are of the first round alone, or can be
            read once only; and, in the round that cannot meet its budget, if ``keep`` is too small.

    References: Frantar, Kurtic, Alistarh, arXiv 2107.03356: 16 recomputations a step.

    >>> import torch, rankwise
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    >>> method, data = rankwise.compressors.MFacPruning(), list(torch.randn(16, 4, 32))
    >>> report = rankwise.compress_gradually(net, method, keep=0.25, rounds=4, data=data, of="macs")
    >>> round(report.totals["keep"]["macs"], 2)
    0.25
    """
    check_count("rounds", rounds)
    if not 0 < keep < 1:
        raise ValueError(f"keep must be > 0 and < 1, got {keep}.")
    data = options.get("data")
    if isinstance(data, Statistics):
        raise ValueError("statistics say nothing about later rounds; give the data themselves.")
    if isinstance(data, Iterator):
        raise ValueError("each round reads the data; give a list of batches, not an iterator.")
    before = {id(layer) for layer in structured(model).values()}
    for done in range(1, rounds):
        compress(model, method, keep=keep ** (done / rounds), **options)
        fold(model, lambda layer: id(layer) not in before)
        if between is not None:
            between(model)
    return compress(model, method, keep=keep, **options)
