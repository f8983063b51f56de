"""The verbs: each selects layers, collects statistics, asks a method, and returns a report."""

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from . import measures as known_measures
from .allocators import uniform, water_filling
from .compression import (
    bias_costs,
    budget_words,
    check_arguments,
    check_weights,
    choices_of,
    dense_costs,
    matrix_costs,
    order_of,
    report_of,
    row_of,
    rows_of,
    shift_of,
    with_bias,
)
from .core import labels as label_kinds
from .core.choices import UNITS, Allocator, Ladder, Unit, budget_of, cost_of, spend
from .core.data import batches_of
from .core.extended import extended
from .core.files import new_folder
from .core.labels import Labels
from .core.latency import Latency, Timer, latencies, time_matrices
from .core.methods import Compressor, Measure, check_function
from .core.progress import track
from .core.report import Report
from .core.statistics import Batch, Statistic, Statistics
from .core.surgery import StructuredLinear, Where, replace, select, structured
from .core.surgery import fold as fold_layers
from .core.ties import declare_ties
from .core.together import together
from .core.watch import collect
from .exporters.base import Exporter, Source
from .matrices import StructuredMatrix
from .matrices.several import is_weights
from .measures.spectral import SpectralMeasure, singular_values
from .models import forget, sample
from .models.blocks import Chain, find_blocks
from .models.causal import check_tokens
from .models.labelled import by_name, placed

Data = Literal["self"] | Tensor | Iterable[Batch] | Statistics


def calibrate(
    model: nn.Module,
    needs: Sequence[type[Statistic]],
    *,
    data: Literal["self"] | Tensor | Iterable[Batch] = "self",
    where: Where | None = None,
    compressed: bool = False,
    labels: Labels | None = None,
    tokens: int = 24576,
    window: int = 512,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Statistics:
    """Collect statistics about the layers of a model, for one or many calls of :func:`compress`.

    Args:
        model: the model, which stays as it is.
        needs: the statistics, such as ``KroneckerFactoredSvd.needs``.
        data: "self" samples sequences from the model, which must be a causal language model; otherwise token
            ids, (t,) or (b, t), or batches as the model takes them, perhaps with labels as in :func:`finetune`.
            What keywords ``attention_mask`` and ``decoder_attention_mask`` mark as padding does not count.
        where: which layers; see :func:`rankwise.core.surgery.select`. Unless it is given, layers that no data
            reaches, or no gradient where such are wanted, have no statistics.
        compressed: also watch layers that are structured already.
        labels: from :mod:`rankwise.core.labels`; None means the sampled tokens themselves for "self", and labels
            drawn from the model for other data, or those of the data where a statistic asks for them.
        tokens: how many tokens "self" samples.
        window: length of a sequence.
        seed: for the sampled sequences and labels.
        autocast: run a float32 model in this type.

    Raises:
        CalibrationError: if the data is empty or does not reach a layer that ``where`` names, or any layer, or if
            a number in the model is not finite.
        ValueError: if no layer is selected, or a statistic asks for labels of the data and there is none.
    """
    check_function("labels", labels, "a function from rankwise.core.labels")
    sites = select(model, where, compressed=compressed)
    check_weights(sites)
    generator = Generator().manual_seed(seed)
    asking = [need.__name__ for need in needs if need.labelled]
    if asking and isinstance(data, str):
        raise ValueError(f"{asking[0]} is zero on the model's own samples but for noise; give data of the task.")
    if asking or isinstance(data, str):
        labels = labels or label_kinds.given
    batches = _batches(model, data, tokens, window, seed)
    labels = placed(labels or label_kinds.automatic, model, batches)
    found = collect(
        model,
        sites,
        needs,
        batches,
        labels=labels,
        generator=generator,
        autocast=autocast,
        total=len(batches),
        strict=where is not None,
    )
    return dataclasses.replace(found, batches=by_name(labels, model, batches))


def compress(
    model: nn.Module,
    method: Compressor,
    *,
    keep: float,
    data: Data = "self",
    of: Unit = "params",
    timer: Timer = time_matrices,
    allocate: Allocator | None = None,
    sequential: bool | float = False,
    where: Where | None = None,
    labels: Labels | None = None,
    tokens: int = 24576,
    window: int = 512,
    seed: int = 0,
) -> Report:
    """Replace the weights of a model by smaller structured matrices, in place, within one budget.

    Nothing in the model changes before all new matrices are made, so an interrupt or an error leaves it whole.

    Args:
        model: any module; see :func:`rankwise.core.surgery.select` for the layers that count.
        method: from :mod:`rankwise.compressors`.
        keep: size of the selected layers afterwards, as a share of their size before; 0 < keep <= 1.
        data: as in :func:`calibrate`, or the statistics it returned. Methods that need no data ignore it,
            unless ``sequential``.
        of: what ``keep`` is a share of: stored numbers, bytes, multiply-adds of one input row, or the time that
            an input row takes, which is then measured on this machine.
        timer: measures that time; see :func:`rankwise.core.latency.time_matrices`.
        allocate: from :mod:`rankwise.allocators`; None means water-filling where the method's errors are
            comparable between layers, otherwise uniform.
        sequential: whether the new matrices are made block by block, each from the inputs that the blocks before
            it make when they are compressed, and aimed at the dense model's outputs; a number from 0 to 1 is
            how far, and True means 0.5. The sizes are those that the dense model's statistics suggest, and the
            errors reported are those against the dense weights, of which it gives up some. Only for a model whose
            blocks form a chain; see :class:`rankwise.models.sequential.Sequential`.
        where: which layers; None selects all weight matrices but embeddings and output heads.
        labels: as in :func:`calibrate`.
        tokens: as in :func:`calibrate`.
        window: as in :func:`calibrate`.
        seed: as in :func:`calibrate`.

    Returns:
        a report with a row for each layer: kind, rank, params before and after, and the error that the method
        predicted and the one measured on the new matrix, both in the method's own units. Each expert of a mixture
        has rows of its own; multiply-adds count as if every token went through all experts. Experts that no token
        of the data reached stay as they are, and so do other such layers unless ``where`` asks for them;
        ``totals["unreached"]`` names them. Of layers that are compressed together, each has an equal share of the
        predicted error, and the first counts what they store once.

    Raises:
        ValueError: if an argument is wrong, a weight is not finite, or the budget cannot be met.
        CalibrationError: if the data is empty, or does not reach any layer, or not one that ``where`` asks for.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    >>> method = rankwise.compressors.WhitenedSvd()
    >>> report = rankwise.compress(net, method, keep=0.75, data=[torch.randn(100, 32)])
    >>> [row["rank"] for row in report.rows], round(report.totals["keep"]["params"], 2)
    ([15, 5], 0.74)
    """
    check_arguments(method, keep, of, sequential)
    check_function("allocate", allocate, "a function from rankwise.allocators")
    sites = select(model, where)
    check_weights(sites)
    order = order_of(sequential, method, sites, lambda: Chain(model, find_blocks(model)))
    if not isinstance(data, Statistics):
        statistics = _statistics(
            model, method, data, where, labels, tokens, window, seed, sequential is not False
        )
    else:
        statistics = data
    if order is not None:
        order.take(statistics.batches)
        order.learn()
    seconds = {"statistics": statistics.seconds}
    start = time.perf_counter()
    unreached = [name for name in sites if method.needs and statistics.unreached(name)]
    if where is not None:
        for name in unreached:  # of statistics that were collected for more layers
            statistics.of(name, method.needs)
    groups = together(sites, method, unreached)
    choices = {
        name: choices_of(group, method, statistics) for name, group in track(groups.items(), "factorisation")
    }
    choices = {name: with_bias(offer, sites[name]) for name, offer in choices.items()}
    seconds["factorisation"] = time.perf_counter() - start
    start = time.perf_counter()
    dense = {name: dense_costs(*[site.weight for site in group.sites]) for name, group in groups.items()}
    timed: dict[str, Latency] = {}
    if of == "latency":
        timed = latencies(choices, {name: group.weight for name, group in groups.items()}, timer)
        choices = {n: dataclasses.replace(c, costs={**c.costs, of: timed[n].costs}) for n, c in choices.items()}
        dense = {name: {**each, of: timed[name].dense} for name, each in dense.items()}
        seconds["timing"] = time.perf_counter() - start
        start = time.perf_counter()
    ladders = {name: Ladder.of(choices[name], of, dense[name][of]) for name in groups}
    budget = budget_of(keep, sum(each[of] for each in dense.values()))
    chosen = allocate or (water_filling if method.comparable else uniform)
    picks = spend(chosen, ladders, budget)
    seconds["allocation"] = time.perf_counter() - start
    start = time.perf_counter()
    indices = {n: int(ladders[n].index[picks[n]]) for n in groups if picks[n] < len(ladders[n].index)}
    refitted: Mapping[str, StructuredMatrix] = {}
    if order is not None:
        refitted = order.fit(
            indices,
            lambda name, weight, new: choices[name].refit(
                indices[name], weight, {**statistics.of(name, method.needs), **new}
            ),
        )
    matrices: dict[str, StructuredMatrix] = {}
    shifts: dict[str, Tensor | None] = {}
    after, rows = {name: dict(each) for name, each in dense.items()}, {}
    for name, group in track(groups.items(), "new matrices"):
        if name not in indices:
            rows |= {site.name: row_of(site.name, site.weight, None, 0.0, 0.0) for site in group.sites}
            continue
        matrix = refitted[name] if name in refitted else choices[name].build(indices[name])
        parts = group.method(method).apart(matrix)
        biases = bias_costs(choices[name], sites[name])
        shifts[name] = shift_of(sites[name], matrix, choices[name])
        after[name] = {unit: cost + biases[unit] for unit, cost in matrix_costs(*parts).items()}
        matrices |= {site.name: part for site, part in zip(group.sites, parts, strict=True)}
        predicted = float(ladders[name].errors[picks[name]])
        rows |= rows_of(group, matrix, parts, choices[name], predicted, biases["params"])
    for name in [name for name in matrices if sites[name].frozen]:
        matrices[name].requires_grad_(False)
    for name, matrix in matrices.items():
        replace(model, sites[name], matrix, shifts.get(name))
    declare_ties(model)
    seconds["new matrices"] = time.perf_counter() - start
    curves = {name: c.spectrum.tolist() for name, c in choices.items() if c.spectrum is not None}
    report = report_of(
        method,
        budget_words(keep, of, order),
        [rows[name] for name in sites],
        {unit: sum(each[unit] for each in dense.values()) for unit in UNITS},
        {unit: sum(each[unit] for each in after.values()) for unit in UNITS},
        seconds,
        curves,
        unreached,
    )
    if not timed:
        return report
    shares = report.totals["keep"] | {of: cost_of(ladders, picks) / sum(each.dense for each in timed.values())}
    tables = {id(each): each.table for each in timed.values()}.values()
    timings = [row for table in tables for row in table]
    return dataclasses.replace(report, totals={**report.totals, "keep": shares, "timings": timings})


def inspect(model: nn.Module, measures: Sequence[Measure] | None = None, *, where: Where | None = None) -> Report:
    """Measure every weight matrix of a model.

    Args:
        model: any module.
        measures: from :mod:`rankwise.measures`; None means all that need no data.
        where: which layers; None means all weight matrices but embeddings and output heads. Structured ones
            are measured as the dense matrices that they stand for.

    Raises:
        ValueError: if no layer is selected or a weight is not finite.
    """
    chosen = measures or [getattr(known_measures, name)() for name in known_measures.__all__]
    for given in chosen:
        if not isinstance(given, Measure):
            raise TypeError(f"measures are objects from rankwise.measures, got {given!r}.")
    sites = select(model, where, compressed=True)
    check_weights(sites)
    rows, curves = [], {}
    for name, site in track(sites.items(), "inspect"):
        weight = site.weight
        values, (m, n) = singular_values(weight), weight.shape
        row = {"name": name, "shape": [m, n], "params": weight.numel()}
        for measure in chosen:
            spectral = isinstance(measure, SpectralMeasure)
            row |= measure.of_spectrum(values, (m, n)) if spectral else measure(weight, {})
        rows.append(row)
        curves[name] = values.tolist()
    totals = {"params": sum(row["params"] for row in rows), "layers_measured": len(rows)}
    return Report(f"{len(rows)} weight matrices", rows, "layers", totals, curves)


def fold(model: nn.Module) -> nn.Module:
    """Turn every structured layer of a model back into an ordinary one, in place; returns the model.

    To leave a compressed model compressed and put adapters into it, use :func:`rankwise.absorb`. Of adapters with
    names what is in use goes into the layers, also a weighted sum. The others are gone then; save them first.

    Raises:
        ValueError: if there is none, a layer has a module behind it that is no part of a weight, or a schedule
            acts on one still (:func:`rankwise.follow`).
    """
    if not isinstance(model, StructuredLinear) and not structured(model) and not extended(model):
        raise ValueError("the model has no structured layer to fold.")
    folded = fold_layers(model)
    forget(folded)
    return folded


def export(
    model: nn.Module | str | Path | Mapping[Any, float],
    to: Exporter,
    out: str | Path,
    *,
    tokenizer: Any = None,
) -> Path:
    """Write a model, compressed or not, in a format that other tools read.

    Args:
        model: a module, which stays as it is, or what :func:`rankwise.load` takes. A folder is the better choice
            for a large model: most formats then read one tensor at a time. For formats that take an adapter, a
            module that has some, or a folder that :func:`rankwise.save` or PEFT wrote, or several folders with
            weights, such as ``{"poet": 0.7, "coder": 0.3}``: the sum of what they change.
        to: from :mod:`rankwise.exporters`.
        out: a new or empty folder. A call that fails leaves nothing under this name.
        tokenizer: of transformers, for a model in memory; a folder has its own.

    Returns:
        the folder.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if ``out`` holds something, there is no such model, or it does not fit the format.
        OSError: if the disk is full.
    """
    if not isinstance(to, Exporter):
        raise TypeError(f"to must be an object from rankwise.exporters, such as Dense(), got {to!r}.")
    if tokenizer is not None and not isinstance(model, nn.Module):
        raise ValueError("a tokenizer is given for a model in memory only; a folder has its own.")
    if isinstance(model, Mapping) and (not model or not is_weights({str(k): w for k, w in model.items()})):
        raise ValueError(f"several adapters are given as folders with finite weights, got {dict(model)!r}.")
    if isinstance(model, Mapping) and len({Path(str(folder)).resolve() for folder in model}) < len(model):
        raise ValueError(f"each adapter is given once, got {[str(folder) for folder in model]}.")
    out = Path(out).absolute()
    if not out.parent.is_dir():
        raise ValueError(f"{out}: the folder {out.parent} does not exist; make it first.")
    with (
        new_folder(out) as made,
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch,
    ):
        made.mkdir()
        to.write(Source(model, tokenizer, Path(scratch)), made)
    return out


def _statistics(
    model: nn.Module,
    method: Compressor,
    data: Literal["self"] | Tensor | Iterable[Batch],
    where: Where | None,
    labels: Labels | None,
    tokens: int,
    window: int,
    seed: int,
    sequential: bool,
) -> Statistics:
    if not method.needs:
        return Statistics({}, 0.0, 0, _batches(model, data, tokens, window, seed) if sequential else ())
    return calibrate(
        model, method.needs, data=data, where=where, labels=labels, tokens=tokens, window=window, seed=seed
    )


def _batches(
    model: nn.Module, data: Literal["self"] | Tensor | Iterable[Batch], tokens: int, window: int, seed: int
) -> Sequence[Batch]:
    data = sampled(model, data, tokens, window, seed) if isinstance(data, str) else data
    batches = batches_of(data, window=window)
    check_tokens(model, batches)
    return batches


def sampled(model: nn.Module, data: str, tokens: int, window: int, seed: int) -> Tensor:
    """Sample token ids from a model if the data is "self", and raise if it is another word."""
    if data != "self":
        raise ValueError(f"data must be 'self', token ids or batches, got {data!r}; tokenize a text first.")
    return sample(model, tokens=tokens, window=window, seed=seed)
