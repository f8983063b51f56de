"""The verb that puts adapters into the numbers of the matrices under them."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from .api import calibrate
from .compressors import PlainSvd
from .compressors.quadratic import QuadraticError
from .core.errors import CalibrationError
from .core.labels import Labels
from .core.report import Report
from .core.several import layers_with, named
from .core.statistics import Batch, Statistics
from .models.absorption import absorb_adapters, adapted_sites


def absorb(
    model: nn.Module,
    method: QuadraticError | None = None,
    *,
    data: Literal["self"] | Tensor | Iterable[Batch] | Statistics | None = None,
    labels: Labels | None = None,
    tokens: int = 24576,
    window: int = 512,
    seed: int = 0,
) -> Report:
    """Put adapters into the stored numbers of the matrices under them, in place, without a number more.

    Where :func:`fold` gives ordinary layers, this leaves a compressed model as small as it was. Changes of
    factors, by :class:`rankwise.adapters.FactorLora`, go into them exactly, and every change of an ordinary
    weight into that. What stands beside a low-rank matrix raises its rank: then the best matrix of the old rank
    takes the place of both, in the metric of ``method``, and the report says how much is lost. In a sum with a
    low-rank term, as low-bit numbers may have, that term takes the change. Nothing changes before all new
    matrices are made. Of adapters with names what is in use goes in, also a weighted sum. All others are gone
    afterwards, since what they stood around has changed; the report names them. Save them first.

    Args:
        model: has adapters.
        method: whose metric measures what is lost, such as ``rankwise.compressors.KroneckerFactoredSvd()``; None
            means that of entries, :class:`rankwise.compressors.PlainSvd`.
        data: for a method that reads statistics: as in :func:`calibrate`, or what it returned.
        labels: as in :func:`calibrate`.
        tokens: as in :func:`calibrate`.
        window: as in :func:`calibrate`.
        seed: as in :func:`calibrate`.

    Returns:
        a row for each layer: kind, rank, numbers before and after, ``lost``, the size of what is lost relative to
        that of the change, and ``error``, relative to that of the changed low-rank matrix; rounding to the types
        in which a model is stored does not count. The total ``idle`` lists adapters that were not in use.

    Raises:
        TypeError: if ``method`` measures no changes.
        ValueError: if there is no adapter in use, one stands beside a matrix that has no place for its change, a
            number is not finite, or a schedule acts on a matrix still (:func:`rankwise.follow`).
        CalibrationError: if the method needs data that is missing, empty, or does not reach a layer.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    >>> _ = rankwise.compress(net, rankwise.compressors.PlainSvd(), keep=0.5)
    >>> _ = rankwise.adapt(net, rankwise.adapters.FactorLora(rank=2))  # and train it
    >>> report = rankwise.absorb(net)
    >>> report.totals["params_before"] == report.totals["params_after"], report.rows[0]["lost"]
    (True, 0.0)
    """
    method = method or PlainSvd()
    if not isinstance(method, QuadraticError):
        raise TypeError(f"method must measure changes, such as KroneckerFactoredSvd(), got {method!r}.")
    sites, statistics = adapted_sites(model), Statistics({}, 0.0, 0)
    if isinstance(data, Statistics):
        statistics = data
    elif method.needs:
        if data is None:
            raise CalibrationError(f"{type(method).__name__} reads statistics; give data.")
        about: dict[str, Any] = {"labels": labels, "tokens": tokens, "window": window, "seed": seed}
        statistics = calibrate(
            model, method.needs, data=data, where=lambda name, _: name in sites, compressed=True, **about
        )
    used = {name for several in layers_with(model).values() for name in several.used}
    idle = [name for name in named(model) if name not in used]
    rows = absorb_adapters(
        model,
        sites,
        lambda name: method.metrics(statistics.of(name, method.needs) if method.needs else {}),
    )
    totals = {key: sum(row[key] for row in rows) for key in ("params_before", "params_after")}
    totals["lost"] = max(row["lost"] for row in rows)
    title = f"{len(rows)} adapters absorbed; at most {totals['lost']:.2g} of a layer's change is lost"
    return Report(
        f"{title}; gone: {', '.join(idle)}" if idle else title, rows, "layers", {**totals, "idle": idle}
    )
