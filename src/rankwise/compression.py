"""What compressing a model in memory and a checkpoint on disk have in common: requests, choices, accounts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from .core.choices import BUDGETS, UNITS, Choices, Unit, nothing
from .core.errors import CalibrationError
from .core.finite import is_finite
from .core.memory import peak_memory_bytes
from .core.methods import Adapter, BlockAdapter, Compressor
from .core.report import Report
from .core.statistics import Statistics
from .core.surgery import Site
from .core.together import Together
from .matrices import StructuredMatrix
from .matrices.base import Place, shared_parts
from .models.blocks import Chain
from .models.sequential import Sequential, strength_of


def check_arguments(method: Compressor, keep: float, of: Unit, sequential: bool | float = False) -> None:
    """Raise if a method, a share or a unit is wrong, or they do not go together."""
    if not isinstance(method, Compressor):
        raise TypeError(f"method must be an object from rankwise.compressors, got {method!r}.")
    check_keep(keep)
    if of not in BUDGETS:
        raise ValueError(f"of must be one of {', '.join(BUDGETS)}, got {of!r}.")
    if sequential is not False:
        if method.shifts:
            raise ValueError(f"{type(method).__name__} gives layers a bias, which cannot be sequential.")
        if method.layers > 1:
            raise ValueError(
                f"{type(method).__name__}(layers={method.layers}) fits blocks together, which cannot be "
                "sequential; give layers=1."
            )
    if of == "latency" and method.layers > 1:
        raise ValueError(
            f"{type(method).__name__}(layers={method.layers}) cannot be budgeted by latency, as what layers "
            "share is stored once and applied by each; give layers=1, or of='macs'."
        )


def check_keep(keep: float) -> None:
    """Raise unless a number is a share to keep."""
    if isinstance(keep, (bool, str)) or not 0 < keep <= 1:
        raise ValueError(f"keep must be > 0 and <= 1, got {keep!r}.")


def check_weights(sites: Mapping[str, Site]) -> None:
    """Raise if a weight holds NaN or infinity."""
    for name, site in sites.items():
        if not all(map(is_finite, site.matrix.state_dict().values())):
            raise ValueError(f"layer {name}: its weight holds NaN or infinity; load a sound checkpoint.")


def order_of(
    sequential: bool | float, method: Compressor, sites: Mapping[str, Site], chain: Callable[[], Chain]
) -> Sequential | None:
    """Return what fits layers one after the other, if that is wanted.

    Raises:
        ValueError: if the method or the model cannot do so.
    """
    if sequential is False:
        return None
    return Sequential(chain(), sites, method.needs, strength_of(sequential))


def choices_of(group: Together, method: Compressor, statistics: Statistics) -> Choices:
    """Ask a method for the choices of a layer, none if no data reached it; an error names the layer."""
    if method.needs and statistics.unreached(group.name):
        return nothing()
    try:
        stats = group.statistics(lambda name: statistics.of(name, method.needs), method.needs)
        return group.method(method).choices(group.weight, stats)
    except ValueError as error:
        names = ", ".join(site.name for site in group.sites)
        raise CalibrationError(f"layer {names}: {error} Or leave the layer out with 'where'.") from error


def dense_costs(*weights: Tensor) -> dict[Unit, int]:
    """What (m, n) weights cost as they are."""
    numbers = sum(weight.numel() for weight in weights)
    return {"params": numbers, "bytes": sum(weight.nbytes for weight in weights), "macs": numbers}


def matrix_costs(*matrices: StructuredMatrix) -> dict[Unit, int]:
    """What structured matrices cost together; what several have in common is stored once."""
    known: dict[int, Place] = {}
    again = [part for matrix in matrices for _, part, _ in shared_parts(matrix, "", known)]
    return {
        "params": sum(each.params for each in matrices) - sum(each.params for each in again),
        "bytes": sum(each.nbytes for each in matrices) - sum(each.nbytes for each in again),
        "macs": sum(each.macs for each in matrices),
    }


def bias_costs(choices: Choices, site: Site) -> dict[Unit, int]:
    """What the biases cost that a layer gets where it had none."""
    count = 0 if choices.mean is None else site.unbiased * site.weight.shape[0]
    return {"params": count, "bytes": count * site.weight.element_size(), "macs": 0}


def with_bias(choices: Choices, site: Site) -> Choices:
    """Add to the costs of choices those of the biases that come with them."""
    extra = bias_costs(choices, site)
    return dataclasses.replace(choices, costs={unit: cost + extra[unit] for unit, cost in choices.costs.items()})


def shift_of(site: Site, matrix: StructuredMatrix | None, choices: Choices) -> Tensor | None:
    """How far the bias of a layer moves (m,), so that the mean of its outputs stays."""
    if matrix is None or choices.mean is None:
        return None
    return (site.weight.double() - matrix.dense().detach().double()) @ choices.mean


def rows_of(
    group: Together,
    whole: StructuredMatrix,
    parts: Sequence[StructuredMatrix],
    choices: Choices,
    predicted: float,
    biases: int = 0,
) -> dict[str, dict[str, Any]]:
    """Describe each layer of a group that is compressed for a report, by name.

    Of the predicted damage each has an equal share; what they store together is counted for the first.

    Args:
        group: the layers.
        whole: the matrix that takes the place of theirs.
        parts: that of each.
        choices: of which it is one.
        predicted: damage of the whole.
        biases: how many numbers of new biases the one layer got.

    Raises:
        ValueError: if the matrix is not finite in the type of the weights.
    """
    if not all(map(is_finite, whole.state_dict().values())):
        raise ValueError(
            f"layer {group.name}: {type(whole).__name__} has numbers that {group.weight.dtype} cannot hold; "
            "convert the model to bfloat16 or float32, or leave the layer out with 'where'."
        )
    changes = group.parts(group.weight.double() - whole.dense().detach().double())
    rows, counted = {}, 0
    for i, (site, part, change) in enumerate(zip(group.sites, parts, changes, strict=True)):
        so_far = matrix_costs(*parts[: i + 1])["params"]
        more = biases + so_far - counted - part.params
        share, measured = predicted / len(parts), choices.error_of(change)
        rows[site.name] = row_of(site.name, site.weight, part, share, measured, more)
        counted = so_far
    return rows


def row_of(
    name: str,
    weight: Tensor,
    matrix: StructuredMatrix | None,
    predicted: float,
    measured: float,
    more: int = 0,
) -> dict[str, Any]:
    """Describe a layer and the matrix that takes its place, or None, for a report.

    ``more`` numbers are stored beside the matrix, such as new biases, or fewer if some are another layer's.
    """
    return {
        "name": name,
        "kind": "Dense" if matrix is None else type(matrix).__name__,
        "rank": min(weight.shape) if matrix is None else matrix.rank,
        "params_before": weight.numel(),
        "params_after": weight.numel() if matrix is None else matrix.params + more,
        "predicted_error": predicted,
        "measured_error": measured,
    }


def budget_words(keep: float, of: Unit, order: Sequential | None) -> str:
    """Say what a compression was asked for."""
    how = "" if order is None else f", fitted in order with strength {order.strength:g}"
    return f"keep {keep:g} of their {of}{how}"


def described(method: Adapter | BlockAdapter | Compressor) -> dict[str, Any]:
    """Return the name and the fields of a method as JSON data; a method may hold others, and functions."""
    fields: Any = dataclasses.fields(method)  # pyright: ignore[reportArgumentType]
    return {"name": type(method).__name__} | {field.name: _data(getattr(method, field.name)) for field in fields}


def _data(value: Any) -> Any:
    """Return a field of a method as JSON data."""
    if isinstance(value, tuple):
        return [_data(part) for part in value]
    if dataclasses.is_dataclass(value):
        return described(cast(Any, value))
    return value.__name__ if callable(value) else value


def report_of(
    method: Compressor,
    budget: str,
    rows: Sequence[Mapping[str, Any]],
    before: Mapping[Any, int],
    after: Mapping[Any, int],
    seconds: Mapping[str, float],
    curves: Mapping[str, Sequence[float]],
    unreached: Sequence[str],
) -> Report:
    """Put the report of a compression together.

    Args:
        method: that was used.
        budget: in words.
        rows: from :func:`row_of`.
        before: cost of all layers before, by unit.
        after: and afterwards.
        seconds: of each stage.
        curves: the spectrum of each layer.
        unreached: layers that no data reached, which stay as they are.
    """
    totals = {
        "method": described(method),
        "keep": {unit: after[unit] / before[unit] for unit in UNITS},
        "seconds": dict(seconds),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    title = f"{type(method).__name__}: {len(rows)} layers at {budget}"
    if unreached:
        totals["unreached"] = list(unreached)
        title += f"; {len(unreached)} that no data reached stay as they are"
    return Report(title, rows, "layers", totals, curves)
