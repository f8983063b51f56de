"""The verb that puts adapters into the numbers of the matrices under them."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .api import calibrate
from .compressors import PlainSvd
from .compressors.quadratic import QuadraticError
from .core.errors import CalibrationError
from .core.extended import refuse_extended
from .core.labels import Labels
from .core.progress import track
from .core.report import Report
from .core.statistics import Batch, Statistics, Stats
from .core.surgery import base_of, fold, replace, select
from .linalg import Metric, recompressed
from .matrices import ChangedFactors, Dense, LowRank, PivotedLowRank, StructuredMatrix, Sum
from .models.low_rank_change import bare, change_of


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
    matrices are made.

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
        that of the change, and ``error``, relative to that of the changed low-rank matrix.

    Raises:
        TypeError: if ``method`` measures no changes.
        ValueError: if there is no adapter, or one stands beside a matrix that has no place for its change.
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
    refuse_extended(model, "cannot go into stored numbers; train an adapter of matrices instead, such as Lora")
    sites = select(model, lambda name, layer: True, compressed=True, tables=True)
    sites = {name: site for name, site in sites.items() if base_of(site.matrix) is not None}
    if not sites:
        raise ValueError("the model has no adapter to absorb; make one with rankwise.adapt.")
    statistics = Statistics({}, 0.0, 0)
    if isinstance(data, Statistics):
        statistics = data
    elif method.needs:
        if data is None:
            raise CalibrationError(f"{type(method).__name__} reads statistics; give data.")
        about: dict[str, Any] = {"labels": labels, "tokens": tokens, "window": window, "seed": seed}
        statistics = calibrate(
            model, method.needs, data=data, where=lambda name, _: name in sites, compressed=True, **about
        )
    made: dict[str, StructuredMatrix] = {}
    rows = []
    for name, site in track(sites.items(), "new matrices"):
        stats: Stats = statistics.of(name, method.needs) if method.needs else {}
        base = base_of(site.matrix)
        assert base is not None
        try:
            made[name], lost = _absorbed(site.matrix, base.matrix, method.metrics(stats))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        about = {"kind": type(made[name]).__name__, "rank": made[name].rank}
        counts = {"params_before": base.params, "params_after": made[name].params}
        rows.append({"name": name, **about, **counts, **lost})
    for name, site in sites.items():
        replace(model, site, made[name].requires_grad_(True))
    fold(model, lambda layer: isinstance(layer.matrix, Dense))
    totals = {key: sum(row[key] for row in rows) for key in ("params_before", "params_after")}
    totals["lost"] = max(row["lost"] for row in rows)
    title = f"{len(rows)} adapters absorbed; at most {totals['lost']:.2g} of a layer's change is lost"
    return Report(title, rows, "layers", totals)


@torch.no_grad()
def _absorbed(
    matrix: StructuredMatrix, base: StructuredMatrix, metrics: tuple[Metric, Metric]
) -> tuple[StructuredMatrix, Mapping[str, float]]:
    """Return a matrix of the form of the base in place of an adapted one, and what is lost."""
    matrix, none = bare(matrix), {"lost": 0.0, "error": 0.0}
    if isinstance(matrix, ChangedFactors):
        return matrix.merged(), none
    if isinstance(base, Dense):
        return Dense(matrix.dense().detach()), none
    made, change = copy.deepcopy(base), change_of(matrix)
    part = _low_rank_in(made)
    if part is None or change is None:
        what = "its base has no low-rank part" if part is None else "its change is of no low rank"
        raise ValueError(
            f"{what} and cannot take the change in; write it out with rankwise.fold, keep the adapter beside it, "
            "adapt its factors with FactorLora where it has some, or train what is stored with rankwise.heal."
        )
    left, right = change.scale * change.left.double(), change.right.double()
    size = recompressed(left, right, 1, *metrics)[2].norm()
    if not float(size):
        return made, none
    first, second = part.factors()
    both = torch.cat([first.double(), left], dim=1), torch.cat([second.double(), right])
    left, right, values = recompressed(*both, part.rank, *metrics)
    part.load_state_dict(part.refitted(left, right).state_dict())
    missing = values[part.rank :].norm()
    return made, {"lost": float(missing / size), "error": float(missing / values.norm())}


def _low_rank_in(matrix: StructuredMatrix) -> LowRank | PivotedLowRank | None:
    """Return the matrix itself, or the term of a sum, that a low-rank change can go into."""
    parts = matrix.parts if isinstance(matrix, Sum) else [matrix]
    found = [part for part in parts if isinstance(part, (LowRank, PivotedLowRank))]
    return max(found, key=lambda part: part.rank, default=None)
