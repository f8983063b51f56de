"""The verbs: each selects layers, collects statistics, asks a method, and returns a report."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from . import measures as known_measures
from .allocators import uniform, water_filling
from .core import labels as label_kinds
from .core.choices import BUDGETS, UNITS, Allocator, Choices, Ladder, Unit, cost_of
from .core.data import batches_of
from .core.errors import CalibrationError
from .core.fingerprint import digest_of, fingerprint
from .core.healing import Healing, Plan, in_float32
from .core.labels import Labels
from .core.latency import Latency, Timer, latencies, time_matrices
from .core.memory import peak_memory_bytes
from .core.methods import Compressor, Measure, Preconditioner, Start
from .core.progress import track
from .core.report import Report
from .core.statistics import Batch, Statistic, Statistics, call_of, collect
from .core.surgery import Site, StructuredLinear, Where, replace, select, structured
from .core.surgery import fold as fold_layers
from .matrices import LowRank, PivotedLowRank, StructuredMatrix
from .measures.spectral import SpectralMeasure, singular_values
from .models import forget, sample
from .preconditioners import KroneckerFactored

Data = Literal["self"] | Tensor | Iterable[Batch] | Statistics


def calibrate(
    model: nn.Module,
    needs: Sequence[type[Statistic]],
    *,
    data: Literal["self"] | Tensor | Iterable[Batch] = "self",
    where: Where | None = None,
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
            ids, (t,) or (b, t), or batches as the model takes them.
        where: which layers; see :func:`rankwise.core.surgery.select`.
        labels: from :mod:`rankwise.core.labels`; None means the sampled tokens themselves for "self", and labels
            drawn from the model for other data.
        tokens: how many tokens "self" samples.
        window: length of a sequence.
        seed: for the sampled sequences and labels.
        autocast: run a float32 model in this type.

    Raises:
        CalibrationError: if the data is empty or a number in the model is not finite.
        ValueError: if no layer is selected.
    """
    sites = select(model, where)
    check_weights(sites)
    generator = Generator().manual_seed(seed)
    if isinstance(data, str):
        data = _sampled(model, data, tokens, window, seed)
        labels = labels or label_kinds.given
    batches = batches_of(data, window=window)
    chosen = labels or label_kinds.automatic
    return collect(
        model,
        sites,
        needs,
        batches,
        labels=chosen,
        generator=generator,
        autocast=autocast,
        total=len(batches),
    )


def compress(
    model: nn.Module,
    method: Compressor,
    *,
    keep: float,
    data: Data = "self",
    of: Unit = "params",
    timer: Timer = time_matrices,
    allocate: Allocator | None = None,
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
        data: as in :func:`calibrate`, or the statistics it returned. Methods that need no data ignore it.
        of: what ``keep`` is a share of: stored numbers, bytes, multiply-adds of one input row, or the time that
            an input row takes, which is then measured on this machine.
        timer: measures that time; see :func:`rankwise.core.latency.time_matrices`.
        allocate: from :mod:`rankwise.allocators`; None means water-filling where the method's errors are
            comparable between layers, otherwise uniform.
        where: which layers; None selects all weight matrices but embeddings and output heads.
        labels: as in :func:`calibrate`.
        tokens: as in :func:`calibrate`.
        window: as in :func:`calibrate`.
        seed: as in :func:`calibrate`.

    Returns:
        a report with a row for each layer: kind, rank, params before and after, and the error that the method
        predicted and the one measured on the new matrix, both in the method's own units.

    Raises:
        ValueError: if an argument is wrong, a weight is not finite, or the budget cannot be met.
        CalibrationError: if the data is empty or does not reach a layer.

    >>> import torch, rankwise
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    >>> method = rankwise.compressors.WhitenedSvd()
    >>> report = rankwise.compress(net, method, keep=0.75, data=[torch.randn(100, 32)])
    >>> [row["rank"] for row in report.rows], round(report.totals["keep"]["params"], 2)
    ([15, 5], 0.74)
    """
    if not isinstance(method, Compressor):
        raise TypeError(f"method must be an object from rankwise.compressors, got {method!r}.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be > 0 and <= 1, got {keep}.")
    if of not in BUDGETS:
        raise ValueError(f"of must be one of {', '.join(BUDGETS)}, got {of!r}.")
    sites = select(model, where)
    check_weights(sites)
    if not isinstance(data, Statistics):
        statistics = _statistics(model, method, data, where, labels, tokens, window, seed)
    else:
        statistics = data
    seconds = {"statistics": statistics.seconds}
    start = time.perf_counter()
    choices = {
        name: _choices(name, site, method, statistics) for name, site in track(sites.items(), "factorisation")
    }
    choices = {name: _with_bias(offer, sites[name]) for name, offer in choices.items()}
    seconds["factorisation"] = time.perf_counter() - start
    start = time.perf_counter()
    dense = {name: dense_costs(site.weight) for name, site in sites.items()}
    timed: dict[str, Latency] = {}
    if of == "latency":
        timed = latencies(choices, {name: site.weight for name, site in sites.items()}, timer)
        choices = {n: dataclasses.replace(c, costs={**c.costs, of: timed[n].costs}) for n, c in choices.items()}
        dense = {name: {**each, of: timed[name].dense} for name, each in dense.items()}
        seconds["timing"] = time.perf_counter() - start
        start = time.perf_counter()
    ladders = {name: Ladder.of(choices[name], of, dense[name][of]) for name in sites}
    budget = int(keep * sum(each[of] for each in dense.values()))
    chosen = allocate or (water_filling if method.comparable else uniform)
    picks = chosen(ladders, budget)
    if (cost := cost_of(ladders, picks)) > budget:
        raise RuntimeError(f"allocator {chosen} spent {cost} of {budget}.")
    seconds["allocation"] = time.perf_counter() - start
    start = time.perf_counter()
    matrices: dict[str, StructuredMatrix | None] = {}
    shifts: dict[str, Tensor | None] = {}
    rows = []
    for name, site in track(sites.items(), "new matrices"):
        step = picks[name]
        matrix = None
        if step < len(ladders[name].index):
            matrix = choices[name].build(int(ladders[name].index[step]))
        matrices[name], shifts[name] = matrix, _shift(site, matrix, choices[name])
        rows.append(_row(name, site, matrix, choices[name], float(ladders[name].errors[step])))
    for name, matrix in matrices.items():
        if matrix is not None:
            replace(model, sites[name], matrix, shifts[name])
    seconds["new matrices"] = time.perf_counter() - start
    before = {unit: sum(each[unit] for each in dense.values()) for unit in UNITS}
    after = {
        unit: sum(
            dense[n][unit] if x is None else matrix_costs(x)[unit] + _bias_costs(choices[n], sites[n])[unit]
            for n, x in matrices.items()
        )
        for unit in UNITS
    }
    totals = {
        "method": described(method),
        "keep": {unit: after[unit] / before[unit] for unit in UNITS},
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if timed:
        totals["keep"][of] = cost_of(ladders, picks) / sum(each.dense for each in timed.values())
        totals["timings"] = [row for each in {id(t): t for t in timed.values()}.values() for row in each.table]
    title = f"{type(method).__name__}: {len(sites)} layers at keep {keep:g} of their {of}"
    curves = {name: c.spectrum.tolist() for name, c in choices.items() if c.spectrum is not None}
    return Report(title, rows, "layers", totals, curves)


def heal(
    model: nn.Module,
    reference: nn.Module,
    *,
    data: Literal["self"] | Tensor | Iterable[Batch] = "self",
    method: Preconditioner | None = None,
    budget: float = 600.0,
    steps: int | None = None,
    statistics: Statistics | None = None,
    also: Callable[[str], bool] | None = None,
    held_out: float = 0.1,
    checkpoint: str | Path | None = None,
    tokens: int = 24576,
    window: int = 512,
    rows: int = 4096,
    every: int = 4,
    patience: int = 4,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Report:
    """Train the stored numbers of a compressed model's matrices, in place, to agree with the model before.

    The loss is KL(reference || model) per token, or half the squared distance per row where the outputs are
    features. Part of the data is kept aside: training stops when the model gets no better on it, and what
    was best there remains, which is the start where nothing was better. That holds after an interrupt or an
    error, too. Models in half precision are kept in float32 meanwhile, and rounded at the end.

    Args:
        model: holds structured matrices; layers left dense do not change.
        reference: the model before compression.
        data: as in :func:`calibrate`; "self" samples from the reference.
        method: from :mod:`rankwise.preconditioners`; None means the default.
        budget: seconds, everything but the sampling of "self" counted.
        steps: the largest number of steps. Only a run that ends by it, not by the clock, can be repeated exactly.
        statistics: what the method needs, of the reference, from :func:`calibrate`; None collects it.
        also: which other parameters to train, by name, such as ``lambda name: "norm" in name``; None means none.
        held_out: share of the batches kept aside, in (0, 1).
        checkpoint: a folder; the same call goes on from what is there, with the very numbers and the
            time already spent.
        tokens: as in :func:`calibrate`.
        window: as in :func:`calibrate`.
        rows: tokens (rows, samples) of a step.
        every: steps between two looks at what was kept aside; each is followed by a checkpoint.
        patience: stop after so many looks without a better one.
        seed: of the order of the data, and as in :func:`calibrate`.
        autocast: run float32 models in this type.

    Returns:
        a row for each look: step, seconds, rows seen, mean divergence while training and on what was kept aside.

    Raises:
        ValueError: if an argument is wrong, nothing is structured, numbers are not finite, or the checkpoint is
            of another task or damaged.
        CalibrationError: if the data is empty.
    """
    plan = Plan(
        seconds=budget, steps=steps, rows=rows, every=every, patience=patience, seed=seed, autocast=autocast
    )
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be > 0 and < 1, got {held_out}.")
    method = method or KroneckerFactored()
    layers: dict[int, tuple[str, StructuredLinear]] = {}
    for name, layer in structured(model).items():
        layers.setdefault(id(layer.matrix), (name, layer))
    named = dict(layers.values())
    if not named:
        raise ValueError("the model has no structured matrix to heal; compress it first.")
    if isinstance(data, str):
        data = _sampled(reference, data, tokens, window, seed)
    start = time.perf_counter()
    batches = portions([data], window) if isinstance(data, Tensor) else batches_of(data)
    train, held = _parted(batches, held_out, seed)
    if statistics is None:
        statistics = Statistics({}, 0.0, 0)
        if method.needs:
            statistics = calibrate(
                reference,
                method.needs,
                data=train,
                where=lambda name, layer: name in named,
                seed=seed,
                autocast=autocast,
            )
    matrices = {name: layer.matrix for name, layer in named.items()}
    trained = {f"{n}.matrix.{k}": p for n, matrix in matrices.items() for k, p in matrix.named_parameters()}
    known = {id(parameter) for parameter in trained.values()}
    chosen = {n: p for n, p in model.named_parameters() if also is not None and also(n) and id(p) not in known}
    biases = {name: layer.bias for name, layer in named.items() if layer.bias is not None}
    biases = {name: bias for name, bias in biases.items() if any(bias is p for p in chosen.values())}
    others = [p for p in chosen.values() if not any(p is bias for bias in biases.values())]
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    specs = {name: matrix.spec() for name, matrix in matrices.items()}
    identity = [described(method), dataclasses.asdict(plan), specs, list(chosen), held_out, _digest(batches)]
    with in_float32(model):
        healing = Healing(
            model,
            reference,
            trained | chosen,
            method.optimizer(matrices, biases, others, statistics),
            train,
            held,
            plan,
            identity=f"{identity} {'' if folder is None else fingerprint(reference)}",
            folder=folder,
            started=start,
        )
        reason = healing.run()
    progress = healing.progress
    first = progress.history[0]["held_out"]
    totals = {
        "method": described(method),
        "held_out": {"before": first, "after": progress.best},
        "improved": progress.best < first,
        "best_step": progress.best_step,
        "steps": progress.step,
        "rows": progress.rows,
        "stopped": reason,
        "trained": sum(p.numel() for p in healing.trained.values()),
        "seconds": progress.history[-1]["seconds"],
        "peak_memory_bytes": peak_memory_bytes(),
    }
    change = (
        f"{first:.4f} -> {progress.best:.4f} nats a row" if progress.best < first else "no better than the start"
    )
    return Report(f"healing, held-out divergence {change}; {reason}", progress.history, "looks", totals)


def inspect(model: nn.Module, measures: Sequence[Measure] | None = None, *, where: Where | None = None) -> Report:
    """Measure every weight matrix of a model.

    Args:
        model: any module.
        measures: from :mod:`rankwise.measures`; None means all that need no data.
        where: which layers; None means all weight matrices but embeddings and output heads.

    Raises:
        ValueError: if no layer is selected or a weight is not finite.
    """
    chosen = measures or [getattr(known_measures, name)() for name in known_measures.__all__]
    sites = select(model, where)
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

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(model, StructuredLinear) and not structured(model):
        raise ValueError("the model has no structured layer to fold.")
    folded = fold_layers(model)
    forget(folded)
    return folded


def initialise(model: nn.Module, start: Start, *, where: Where | None = None, seed: int = 0) -> Report:
    """Replace the weights of a model by structured ones to train from scratch, in place; their values are lost.

    Args:
        model: any module, freshly made.
        start: from :mod:`rankwise.starts`.
        where: which layers; None selects all weight matrices but embeddings and output heads.
        seed: of all random numbers; the same in every process of a distributed run.

    Raises:
        ValueError: if no layer is selected.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    >>> from rankwise import starts
    >>> report = initialise(net, starts.SparsePlusLowRankStart(rank=4))
    >>> [row["params_after"] for row in report.rows]
    [820, 326]
    """
    if not isinstance(start, Start):
        raise TypeError(f"start must be an object from rankwise.starts, got {start!r}.")
    sites, generator = select(model, where), Generator().manual_seed(seed)
    rows = []
    for name, site in track(sites.items(), "new matrices"):
        m, n = site.weight.shape
        matrix = start.matrix(m, n, generator).to(device=site.weight.device, dtype=site.weight.dtype)
        rows.append(
            {
                "name": name,
                "params_before": site.weight.numel(),
                "params_after": matrix.params,
                "rank": matrix.rank,
            }
        )
        replace(model, site, matrix)
    before, after = (sum(row[key] for row in rows) for key in ("params_before", "params_after"))
    title = f"{type(start).__name__}: {len(sites)} layers to train from scratch"
    return Report(title, rows, "layers", {"keep": {"params": after / before}})


def trainable_low_rank(model: nn.Module) -> Report:
    """Let only the low-rank matrices of a compressed model be trained, in place; all else is frozen.

    Dense layers, embeddings, heads and normalisations stay as they are, and so do other terms of a sum, such as
    the low-bit one of :class:`rankwise.compressors.GptqPlusLowRank`.

    Returns:
        a report with a row for each trainable matrix; its totals say how many numbers train, of how many.

    Raises:
        ValueError: if there is none.

    References: training the low-rank components alone is WeLore's, arXiv 2407.11239.

    >>> import torch
    >>> from torch import nn
    >>> from rankwise.compressors import PlainSvd
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    >>> _ = compress(net, PlainSvd(), keep=0.5, where=lambda name, _: name == "0")
    >>> trainable_low_rank(net).totals
    {'trainable': 448, 'params': 744}
    """
    matrices = {
        f"{name}.{path}" if path else name: part
        for name, layer in structured(model).items()
        for path, part in layer.matrix.named_modules()
        if isinstance(part, (LowRank, PivotedLowRank))
    }
    if not matrices:
        raise ValueError("the model has no low-rank matrix to train; compress it with a low-rank method first.")
    model.requires_grad_(False)
    rows = []
    for name, matrix in matrices.items():
        matrix.requires_grad_(True)
        count = sum(parameter.numel() for parameter in matrix.parameters())
        rows.append({"name": name, "kind": type(matrix).__name__, "rank": matrix.rank, "trainable": count})
    parameters = list(model.parameters())
    totals = {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "params": sum(p.numel() for p in parameters),
    }
    return Report(f"{len(rows)} low-rank matrices train", rows, "layers", totals)


def check_weights(sites: Mapping[str, Site]) -> None:
    """Raise if a weight holds NaN or infinity."""
    for name, site in sites.items():
        if not bool(site.weight.isfinite().all()):
            raise ValueError(f"layer {name}: its weight holds NaN or infinity; load a sound checkpoint.")


def described(method: Compressor | Preconditioner) -> dict[str, Any]:
    """Return the name and the fields of a method as JSON data; a method may hold others."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
    return {"name": type(method).__name__} | {
        name: [described(part) for part in value] if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def dense_costs(weight: Tensor) -> dict[Unit, int]:
    """What an (m, n) weight costs as it is."""
    return {"params": weight.numel(), "bytes": weight.numel() * weight.element_size(), "macs": weight.numel()}


def matrix_costs(matrix: StructuredMatrix) -> dict[Unit, int]:
    """What a structured matrix costs."""
    return {"params": matrix.params, "bytes": matrix.nbytes, "macs": matrix.macs}


def _statistics(
    model: nn.Module,
    method: Compressor,
    data: Literal["self"] | Tensor | Iterable[Batch],
    where: Where | None,
    labels: Labels | None,
    tokens: int,
    window: int,
    seed: int,
) -> Statistics:
    if not method.needs:
        return Statistics({}, 0.0, 0)
    return calibrate(
        model, method.needs, data=data, where=where, labels=labels, tokens=tokens, window=window, seed=seed
    )


def _sampled(model: nn.Module, data: str, tokens: int, window: int, seed: int) -> Tensor:
    if data != "self":
        raise ValueError(f"data must be 'self', token ids or batches, got {data!r}; tokenize a text first.")
    return sample(model, tokens=tokens, window=window, seed=seed)


def portions(texts: Sequence[Tensor], window: int) -> list[Batch]:
    """Cut texts of token ids into batches to heal with: at most 1024 tokens each, and about twenty or more."""
    together = min(1024, sum(ids.numel() for ids in texts) // 20)
    return [batch for ids in texts for batch in batches_of(ids, window=window, tokens=together)]


def _parted(batches: Sequence[Batch], share: float, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Keep a share of the batches aside, at least one, chosen at random."""
    if len(batches) < 2:
        raise CalibrationError(
            "healing needs two batches or more, one of them to judge by; give more data, or a shorter window."
        )
    order = torch.randperm(len(batches), generator=Generator().manual_seed(seed)).tolist()
    aside = set(order[: min(max(round(share * len(batches)), 1), len(batches) - 1)])
    parts = [batch for i, batch in enumerate(batches) if i not in aside]
    return parts, [batches[i] for i in sorted(aside)]


def _digest(batches: Sequence[Batch]) -> str:
    """Hash the tensors of batches."""
    arguments = [call_of(batch, torch.device("cpu")) for batch in batches]
    values = {f"{i} {k}": v for i, (a, o) in enumerate(arguments) for k, v in [*enumerate(a), *o.items()]}
    return digest_of({key: value for key, value in values.items() if isinstance(value, Tensor)})


def _choices(name: str, site: Site, method: Compressor, statistics: Statistics) -> Choices:
    try:
        return method.choices(site.weight, statistics.of(name, method.needs))
    except ValueError as error:
        raise CalibrationError(f"layer {name}: {error} Or leave the layer out with 'where'.") from error


def _bias_costs(choices: Choices, site: Site) -> dict[Unit, int]:
    """What the biases cost that a layer gets where it had none."""
    count = 0 if choices.mean is None else site.unbiased * site.weight.shape[0]
    return {"params": count, "bytes": count * site.weight.element_size(), "macs": 0}


def _with_bias(choices: Choices, site: Site) -> Choices:
    """Add to the costs of choices those of the biases that come with them."""
    extra = _bias_costs(choices, site)
    return dataclasses.replace(choices, costs={unit: cost + extra[unit] for unit, cost in choices.costs.items()})


def _shift(site: Site, matrix: StructuredMatrix | None, choices: Choices) -> Tensor | None:
    """How far the bias of a layer moves (m,), so that the mean of its outputs stays."""
    if matrix is None or choices.mean is None:
        return None
    return (site.weight.double() - matrix.dense().detach().double()) @ choices.mean


def _row(name: str, site: Site, matrix: StructuredMatrix | None, choices: Choices, predicted: float) -> dict:
    weight = site.weight
    measured = 0.0 if matrix is None else choices.error_of(weight.double() - matrix.dense().detach().double())
    return {
        "name": name,
        "kind": "Dense" if matrix is None else type(matrix).__name__,
        "rank": min(weight.shape) if matrix is None else matrix.rank,
        "params_before": weight.numel(),
        "params_after": weight.numel()
        if matrix is None
        else matrix.params + _bias_costs(choices, site)["params"],
        "predicted_error": predicted,
        "measured_error": measured,
    }
