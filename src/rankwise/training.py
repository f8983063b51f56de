"""The verbs that train, or prepare for it: each selects matrices, changes them in place, and returns a report."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from .api import sampled
from .core.adapted import adapted, refuse_adapted
from .core.data import batches_of, digest_of_batches, parted
from .core.fingerprint import fingerprint
from .core.healing import Likeness, still
from .core.memory import peak_memory_bytes
from .core.methods import Start, check_function
from .core.modes import in_float32
from .core.plan import Plan
from .core.progress import track
from .core.rates import check_rate
from .core.report import Report
from .core.running import Run
from .core.several import check_one, scheduled
from .core.statistics import Batch
from .core.surgery import Where, base_of, replace, select, structured
from .matrices import LowRank, PivotedLowRank, StructuredMatrix
from .models.causal import check_tokens

CHECKPOINT = "healing.safetensors"
MOST_ASIDE = 4  # batches that are judged by: each look runs them all
BETAS = (0.9, 0.95)  # of Adam: a short memory, since steps are few
BACK = 0.3  # of the rate, after a look that is no better than the best


def heal(
    model: nn.Module,
    reference: nn.Module,
    *,
    data: Literal["self"] | Tensor | Iterable[Batch] = "self",
    lr: float = 5e-5,
    budget: float = 600.0,
    steps: int | None = None,
    also: Callable[[str], bool] | None = None,
    held_out: float = 0.1,
    checkpoint: str | Path | None = None,
    tokens: int = 24576,
    window: int = 512,
    rows: int = 1024,
    every: int = 16,
    patience: int = 4,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> Report:
    """Train a compressed model's matrices, or adapters, in place, to agree with the model before.

    What trains are the stored numbers of the structured matrices, or, where the model has adapters, those of the
    adapters alone; :func:`rankwise.absorb` then puts them into the matrices.

    The loss is KL(reference || model) per token, or half the squared distance per row where the outputs are
    features. Part of the data is kept aside. After a look at it that is no better, training goes back to the
    best numbers and on at a lower rate. It stops when the model gets no better, and what was best there remains,
    which is the start where nothing was better. That holds after an interrupt or an error, too. Models in half
    precision are kept in float32 meanwhile, and rounded at the end.

    Args:
        model: holds structured matrices; layers left dense do not change unless they are adapted.
        reference: the model before compression.
        data: as in :func:`calibrate`; "self" samples from the reference.
        lr: the largest learning rate of Adam; three tenths of it after each look that is no better. Weights are
            of the order of 0.1. The default made the healed rows of docs/results.md; other texts chose it.
        budget: seconds, everything but the sampling of "self" counted.
        steps: the largest number of steps. Only a run that ends by it, not by the clock, can be repeated exactly.
        also: which other parameters to train, by name, such as ``lambda name: "norm" in name``; None means none.
        held_out: share of the batches kept aside, in (0, 1); four batches at most.
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
        ValueError: if an argument is wrong, nothing is structured, an adapter trains by a schedule, numbers are
            not finite, or the checkpoint is of another task or damaged.
        CalibrationError: if the data is empty.
    """
    plan = Plan(
        seconds=budget, steps=steps, rows=rows, every=every, patience=patience, back=BACK, seed=seed,
        autocast=autocast,
    )  # fmt: skip
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be > 0 and < 1, got {held_out}.")
    check_rate(lr)
    check_function("also", also, "a function of the name of a parameter")
    matrices = _to_heal(model)
    if also is not None and not any(also(name) for name, _ in model.named_parameters()):
        raise ValueError("'also' accepts no parameter of the model.")
    if isinstance(data, str):
        data = sampled(reference, data, tokens, window, seed)
    start = time.perf_counter()
    batches = portions([data], window) if isinstance(data, Tensor) else batches_of(data)
    check_tokens(model, batches)
    train, held = parted(batches, held_out, seed, most=MOST_ASIDE)
    trained: dict[str, nn.Parameter] = {}
    known: set[int] = set()
    for name, matrix in matrices.items():
        for key, parameter in matrix.named_parameters():
            if id(parameter) not in known and (base_of(matrix) is None or parameter.requires_grad):
                trained[f"{name}.matrix.{key}"] = parameter  # layers may share it
            known.add(id(parameter))
    chosen = {n: p for n, p in model.named_parameters() if also is not None and also(n) and id(p) not in known}
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    specs = {name: matrix.spec() for name, matrix in matrices.items()}
    identity = [lr, dataclasses.asdict(plan), specs, list(chosen), held_out, digest_of_batches(batches)]
    numbers = trained | chosen
    if not numbers:
        raise ValueError("all numbers of the adapters are frozen; let some ask for gradients.")
    with in_float32(list(model.parameters())):
        healing = Run(
            model,
            numbers,
            torch.optim.Adam(numbers.values(), lr=lr, betas=BETAS),
            plan,
            functools.partial(still, model, numbers),
            word="divergence",
            identity=f"{identity} {'' if folder is None else fingerprint(reference)}",
            file=None if folder is None else folder / CHECKPOINT,
            started=start,
        )
        reason = healing.run(*([Likeness(each, reference, autocast) for each in part] for part in (train, held)))
    progress = healing.progress
    first = progress.history[0]["held_out"]
    totals = {
        "lr": lr,
        **healing.summary(),
        "stopped": reason,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    change = (
        f"{first:.4f} -> {progress.best:.4f} nats a row" if progress.best < first else "no better than the start"
    )
    return Report(f"healing, held-out divergence {change}; {reason}", progress.history, "looks", totals)


def _to_heal(model: nn.Module) -> dict[str, StructuredMatrix]:
    """Return the adapted matrices of a model, or, where there are none, all structured ones, each once."""
    check_one(model)
    layers: dict[int, tuple[str, StructuredMatrix]] = {}
    following = {id(part) for part in scheduled(model).values()}
    for name, layer in (adapted(model) or structured(model)).items():
        layers.setdefault(id(layer.matrix), (name, layer.matrix))
        if any(id(part) in following for part in layer.matrix.modules()):
            raise ValueError(f"layer {name} has an adapter that trains by a schedule; use rankwise.finetune.")
    if not layers:
        raise ValueError("the model has no structured matrix to heal; compress it first.")
    return dict(layers.values())


def initialise(model: nn.Module, start: Start, *, where: Where | None = None, seed: int = 0) -> Report:
    """Replace the weights of a model by structured ones to train, in place.

    Their values are lost, unless the start says that it takes them.

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
        matrix = start.of(site.weight, generator).to(device=site.weight.device, dtype=site.weight.dtype)
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
    title = f"{type(start).__name__}: {len(sites)} layers to train"
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
    >>> from rankwise import compress
    >>> from rankwise.compressors import PlainSvd
    >>> net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    >>> _ = compress(net, PlainSvd(), keep=0.5, where=lambda name, _: name == "0")
    >>> trainable_low_rank(net).totals
    {'trainable': 448, 'params': 744}
    """
    refuse_adapted(model)
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


def portions(texts: Sequence[Tensor], window: int) -> list[Batch]:
    """Cut texts of token ids into batches to heal with: at most 1024 tokens each, and about twenty or more."""
    together = min(1024, sum(ids.numel() for ids in texts) // 20)
    return [batch for ids in texts for batch in batches_of(ids, window=window, tokens=together)]
