"""The verb that prepares a model for training few numbers."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from .allocators import water_filling
from .api import calibrate
from .compression import check_weights, described
from .core.adapted import own_tensors
from .core.choices import Ladder, spend
from .core.errors import CalibrationError
from .core.insertion import insert
from .core.labels import Labels
from .core.methods import Adapter, BlockAdapter, check_function
from .core.progress import track
from .core.report import Report
from .core.several import check_name, choose, join, used
from .core.statistics import Batch, Statistics, Stats
from .core.surgery import Site, Where, base_of, replace, select
from .core.ties import declare_ties
from .core.views import EmbeddingView
from .matrices import Base, StructuredMatrix
from .matrices.base import TooSmallError
from .models.classifier import refuse_new_head


def adapt(
    model: nn.Module,
    method: Adapter | BlockAdapter,
    *,
    name: str | None = None,
    where: Where | None = None,
    embeddings: bool = False,
    data: Literal["self"] | Tensor | Iterable[Batch] | Statistics | None = None,
    also: Callable[[str], bool] | None = None,
    labels: Labels | None = None,
    tokens: int = 24576,
    window: int = 512,
    seed: int = 0,
) -> Report:
    """Put trained numbers beside the weights of a model, in place, and freeze all others.

    The model computes what it did. Layers may be ordinary or compressed. Nothing changes before all adapters are
    made. Train the parameters that ask for gradients, in any loop; then :func:`rankwise.save` them, or
    :func:`rankwise.fold` them into the weights.

    Args:
        model: any module; see :func:`rankwise.core.surgery.select` for the layers that count.
        method: from :mod:`rankwise.adapters`.
        name: under which the adapter stands beside others around the same matrices, which may be on other layers
            and of other kinds. It is made for the model without them, and is then in use, alone: see
            :func:`rankwise.use`. A classifier whose head is new takes none, since the head must train, too.
        where: which layers; None selects all weight matrices but output heads, those that ``also`` accepts, and
            those that are too small for the method, such as a gate of one output, or that data which it reads did
            not reach, which the report names. For modules that stand behind layers None selects those that write
            into the streams of blocks.
        embeddings: also adapt the embeddings that ``where`` accepts and that share their weight with no other
            layer. Only methods that need no data can. The vector of a padding token (``padding_idx``) stays as
            it is, whatever the method does to the others: ``nn.Embedding`` does not train it either.
        data: for methods that read statistics: as in :func:`calibrate`, or what it returned.
        also: which other parameters train whole, by name, such as ``lambda name: "norm" in name``.
        labels: as in :func:`calibrate`.
        tokens: as in :func:`calibrate`.
        window: as in :func:`calibrate`.
        seed: of all random numbers.

    Returns:
        a report with a row for each layer; its totals say how many numbers train, of how many, and under
        ``left_out`` why layers were left out.

    Raises:
        TypeError: if ``method`` is no adapter.
        ValueError: if no layer is selected or large enough, one is adapted already or does not fit, or a weight
            is not finite.
        CalibrationError: if the method needs data that is missing, empty, or does not reach any layer, or not one
            that ``where`` asks for.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    >>> report = rankwise.adapt(net, rankwise.adapters.Lora(rank=2))
    >>> [row["trained"] for row in report.rows], report.totals["params"]
    ([128, 80], 1528)
    """
    check_function("also", also, "a function of the name of a parameter")
    if name is not None and (also is not None or isinstance(method, BlockAdapter)):
        raise ValueError(
            "an adapter with a name can be switched off, which parameters that train whole and modules behind "
            "layers cannot; leave 'also' out, or the name."
        )
    check_name(model, name)
    if name is not None:
        refuse_new_head(model)
    with used(model, None):
        report = _adapted(model, method, name, where, embeddings, data, also, labels, tokens, window, seed)
    if name is None:
        return report
    choose(model, name)
    trained = {**report.totals, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    return dataclasses.replace(report, totals=trained)


def _adapted(
    model: nn.Module,
    method: Adapter | BlockAdapter,
    name: str | None,
    where: Where | None,
    embeddings: bool,
    data: Any,
    also: Callable[[str], bool] | None,
    labels: Labels | None,
    tokens: int,
    window: int,
    seed: int,
) -> Report:
    """Adapt a model of which no adapter with a name is in use."""
    if isinstance(method, BlockAdapter):
        if embeddings or data is not None or labels is not None:
            raise ValueError(f"{type(method).__name__} reads no data and stands behind no embeddings.")
        check_weights(select(model, compressed=True))
        whole = _whole(model, also, ())
        rows = insert(model, method, where, seed)
        declare_ties(model)
        return _report(model, method, rows, len(rows), whole)
    if not isinstance(method, Adapter):
        raise TypeError(f"method must be an object from rankwise.adapters, got {method!r}.")
    sites = select(model, where, compressed=True, tables=embeddings)
    if where is None and also is not None:
        sites = {name: site for name, site in sites.items() if not _accepted(model, site, also)}
    if embeddings and not any(isinstance(site.view, EmbeddingView) for site in sites.values()):
        raise ValueError(
            "no embedding was selected: each shares its weight with another layer, or 'where' refuses."
        )
    for path, site in sites.items():
        if base_of(site.under) is not None:
            raise ValueError(f"layer {path} has an adapter already; fold or remove that first, or leave it out.")
    check_weights(sites)
    whole = _whole(model, also, [path for site in sites.values() for path in site.names])
    stats = _statistics(model, method, sites, where, data, labels, tokens, window, seed)
    generator = Generator().manual_seed(seed)
    out = {path: "no data reached it." for path in sites if path not in stats}  # what is left out, and why
    about = functools.partial(_about, out=out if where is None else None)
    bases = {path: site.under for path, site in sites.items() if path in stats}
    ranks = _ranks(method, bases, stats, about)
    made = {}
    for path, base in track(bases.items(), "adapters"):
        if ranks.get(path) != 0 and path not in out:
            with about(path):
                own = method.with_rank(ranks[path]) if path in ranks else method
                made[path] = sites[path].view.adapted(own.attach(Base(base), stats[path], generator))
                for tensor in own_tensors(made[path]).values():
                    tensor.data = tensor.data.contiguous()  # as files have it: the order of sums depends on it
    if len(out) == len(sites):
        path, why = next(iter(out.items()))
        raise ValueError(f"all layers are too small, or not reached by data. Layer {path}: {why}")
    model.requires_grad_(False)
    rows = []
    for path, site in sites.items():
        if path in out:
            continue
        trained = 0
        if path in made:
            trained = sum(p.numel() for p in made[path].parameters() if p.requires_grad)
            if name is None:
                replace(model, site, made[path], lr=method.lr)
            else:
                join(model, site, name, made[path], method.lr)
        rank = ranks.get(path, getattr(method, "rank", None))
        rows.append({"name": path, "shape": list(bases[path].shape), "rank": rank, "trained": trained})
    declare_ties(model)
    unspent = getattr(method, "rank", 0) * len(ranks) - sum(ranks.values()) if ranks else 0
    return _report(model, method, rows, len(made), whole, out, unspent)


def _accepted(model: nn.Module, site: Site, also: Callable[[str], bool]) -> bool:
    """Whether parameters that train whole hold the weight of a layer."""
    held = [name for layer in site.names for name, _ in model.named_parameters() if _holds(name, layer)]
    return any(also(name) for name in held)


def _holds(parameter: str, layer: str) -> bool:
    """Whether a parameter is the weight of a layer, a part of that, or what it is a slice of."""
    inside = parameter == f"{layer}.weight" or parameter.startswith(f"{layer}.matrix.")
    return inside or layer.startswith(f"{parameter}.")


def _whole(model: nn.Module, also: Callable[[str], bool] | None, layers: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters that train whole.

    Raises:
        ValueError: if there is none though some were asked for, or one is the weight of a layer that is adapted.
    """
    if also is None:
        return []
    found = {name: parameter for name, parameter in model.named_parameters() if also(name)}
    if not found:
        raise ValueError("'also' accepts no parameter of the model.")
    for name in found:
        if any(_holds(name, layer) for layer in layers):
            raise ValueError(
                f"'also' accepts {name}, the weight of a layer that is adapted; narrow 'also', or leave the "
                "layer out with 'where'."
            )
    return list(found.values())


def _report(
    model: nn.Module,
    method: Adapter | BlockAdapter,
    rows: list[dict[str, Any]],
    count: int,
    whole: Sequence[nn.Parameter],
    out: Mapping[str, str] | None = None,
    unspent: int = 0,
) -> Report:
    """Let other parameters train too, and count all that do.

    Args:
        model: is adapted.
        method: by which.
        rows: a row for each layer.
        count: of layers.
        whole: the other parameters.
        out: the layers that are left out, and why.
        unspent: ranks by which no layer gains.
    """
    for parameter in whole:
        parameter.requires_grad_(True)
    totals = {
        "method": described(method),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "params": sum(p.numel() for p in model.parameters()),
        "left_out": dict(out or {}),
        "unspent": unspent,
    }
    names = [*(out or {})]
    few = ", ".join(names[:3]) + " ..." * (len(names) > 3)
    rest = f"; left out, too small or not reached by data: {few}" if names else ""
    rest += f"; {unspent} ranks are left over, as no layer gains by them" if unspent else ""
    return Report(f"{type(method).__name__}: {count} layers adapted{rest}", rows, "layers", totals)


@contextlib.contextmanager
def _about(name: str, out: dict[str, str] | None) -> Iterator[None]:
    """Have an error name the layer, or note that a layer is too small, where that is no error."""
    try:
        yield
    except TooSmallError as error:
        if out is None:
            raise ValueError(f"layer {name}: {error} Or leave the layer out with 'where'.") from error
        out[name] = str(error)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error} Or leave the layer out with 'where'.") from error


def _ranks(
    method: Adapter,
    bases: Mapping[str, StructuredMatrix],
    stats: Mapping[str, Stats],
    about: Callable[[str], AbstractContextManager[None]],
) -> dict[str, int]:
    """Spread ranks over layers that are large enough, where the method does so."""
    rule, rank, step = method.ranks, getattr(method, "rank", 0), method.step
    if rule is None:
        return {}
    ladders = {}
    for name, base in bases.items():
        with about(name):
            largest = method.largest(*base.shape)
            if rank > largest:
                raise TooSmallError(f"{base.shape} takes at most rank {largest}, got {rank}; give a smaller one.")
            count = min(round(rule.most * rank), largest) // step
            missed = rule.missed(base, stats[name], step * count).double().cpu()[::step]
            ladders[name] = Ladder(torch.arange(count + 1) * step, missed, torch.arange(count), float(missed[0]))
    picks = spend(water_filling, ladders, rank * len(ladders)) if ladders else {}
    return {name: step * pick for name, pick in picks.items()}


def _statistics(
    model: nn.Module,
    method: Adapter,
    sites: Mapping[str, Site],
    where: Where | None,
    data: Any,
    labels: Labels | None,
    tokens: int,
    window: int,
    seed: int,
) -> dict[str, Stats]:
    """Return what a method reads about layers, without those that no data reached and nobody asked for."""
    needs = tuple(dict.fromkeys((*method.needs, *(method.ranks.needs if method.ranks else ()))))
    if not needs:
        return {name: {} for name in sites}
    tables = [name for name, site in sites.items() if isinstance(site.view, EmbeddingView)]
    if tables:
        raise ValueError(f"{type(method).__name__} reads statistics, which embeddings have none of: {tables}.")
    if data is None:
        raise CalibrationError(
            f"{type(method).__name__} reads statistics; give data, best that of the task, or 'self'."
        )
    if not isinstance(data, Statistics):
        about: dict[str, Any] = {"tokens": tokens, "window": window, "seed": seed}
        if where is not None:
            names = {name for site in sites.values() for name in site.names}
            about["where"] = lambda name, layer: name in names
        data = calibrate(model, needs, data=data, labels=labels, compressed=True, **about)
    return {name: data.of(name, needs) for name in sites if where is not None or not data.unreached(name)}
