"""Adapters put into the stored numbers of the matrices under them, without a number more."""

import copy
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import nn

from ..core.adapted import in_use
from ..core.extended import refuse_extended
from ..core.finite import is_finite
from ..core.progress import track
from ..core.surgery import Site, base_of, fold, refuse_followed, replace, select, structured
from ..core.ties import declare_ties
from ..linalg import Metric, recompressed
from ..matrices import ChangedFactors, Dense, LowRank, PivotedLowRank, StructuredMatrix, Sum
from ..matrices.base import Place, shared_parts
from ..matrices.thin import bare
from .low_rank_change import change_of


def adapted_sites(model: nn.Module) -> dict[str, Site]:
    """Return the layers of a model that have an adapter, in use or not, embeddings included.

    Raises:
        ValueError: if there is none in use, each row of a batch has its own, a module stands behind a layer, or a
            schedule acts on a matrix still.
    """
    refuse_followed(model)
    refuse_extended(model, "cannot go into stored numbers; train an adapter of matrices instead, such as Lora")
    sites = select(model, lambda name, layer: True, compressed=True, tables=True)
    sites = {name: site for name, site in sites.items() if base_of(site.matrix) is not None}
    if not in_use(model):
        raise ValueError(
            "the model has no adapter to absorb; make one with rankwise.adapt, or choose one with rankwise.use."
        )
    return sites


def absorb_adapters(
    model: nn.Module, sites: Mapping[str, Site], metrics: Callable[[str], tuple[Metric, Metric]]
) -> list[dict[str, Any]]:
    """Put the adapters of layers into the matrices under them, in place; nothing changes before all are made.

    Of adapters with names what is in use is put in, and the others are gone afterwards.

    Args:
        model: has adapters.
        sites: from :func:`adapted_sites`.
        metrics: gives S (m, m) and C (n, n) of a layer, in which what is lost is measured.

    Returns:
        a row for each layer where an adapter is in use; see :func:`rankwise.absorb`.

    Raises:
        ValueError: if a number is not finite, or a matrix has no place for the change; it names the layer.
    """
    made: dict[str, StructuredMatrix] = {}
    rows, used = [], in_use(model)
    _refuse_shared(model, used)
    for name, site in track(sites.items(), "new matrices"):
        base = base_of(site.matrix)
        assert base is not None
        if name not in used:
            made[name] = base.matrix
            continue
        try:
            _check_finite(used[name], "its matrix or its adapter holds NaN or infinity: the training went wrong")
            made[name], lost = _absorbed(used[name], base.matrix, metrics(name))
            _check_finite(made[name], f"with its adapter it has numbers too large for {made[name].dtype}")
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        about = {"kind": type(made[name]).__name__, "rank": made[name].rank}
        counts = {"params_before": base.params, "params_after": made[name].params}
        rows.append({"name": name, **about, **counts, **lost})
    for name, site in sites.items():
        replace(model, site, made[name].requires_grad_(True))
    fold(model, lambda layer: isinstance(layer.matrix, Dense))
    declare_ties(model)
    return rows


def _refuse_shared(model: nn.Module, used: Container[str]) -> None:
    """Raise ValueError if an adapter changes a matrix a part of which is also another layer's."""
    known: dict[int, Place] = {}
    for name, layer in structured(model).items():
        base = base_of(layer.matrix)
        for part, _, (other, _) in shared_parts(layer.matrix if base is None else base.matrix, name, known):
            if part and (name in used or other in used):
                raise ValueError(
                    f"layers {other} and {name} share a part of their matrices, which cannot take in two "
                    "changes; write them out with rankwise.fold, or keep the adapter beside them."
                )


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
    missing, whole = values[part.rank :].norm(), values.norm().clamp_min(torch.finfo(values.dtype).tiny)
    return made, {"lost": float(missing / size), "error": float(missing / whole)}


def _check_finite(matrix: StructuredMatrix, problem: str) -> None:
    tensors = [*matrix.parameters(), *matrix.buffers()]
    if not all(map(is_finite, tensors)):
        raise ValueError(f"{problem}; nothing was changed.")


def _low_rank_in(matrix: StructuredMatrix) -> LowRank | PivotedLowRank | None:
    """Return the matrix itself, or the term of a sum, that a low-rank change can go into."""
    parts = matrix.parts if isinstance(matrix, Sum) else [matrix]
    found = [part for part in parts if isinstance(part, (LowRank, PivotedLowRank))]
    return max(found, key=lambda part: part.rank, default=None)
