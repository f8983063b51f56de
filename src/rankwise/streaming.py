"""Compression of a checkpoint that does not fit in memory, block by block, resumable after a kill."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .allocators import uniform, water_filling
from .compression import (
    budget_words,
    check_arguments,
    choices_of,
    dense_costs,
    described,
    matrix_costs,
    order_of,
    report_of,
    row_of,
    rows_of,
)
from .core import labels as label_kinds
from .core.choices import UNITS, Allocator, Choices, Ladder, Unit, budget_of, spend
from .core.data import batches_of, digest_of_batches
from .core.labels import Labels
from .core.methods import Compressor, check_function, check_seed
from .core.modes import without_cache
from .core.progress import track
from .core.report import Report
from .core.states import told
from .core.statistics import Batch, Statistics, Stats
from .core.steps import Steps
from .core.surgery import Where, replace, select
from .core.tensor_file import write_tensors
from .core.together import Together
from .matrices import StructuredMatrix
from .models.blocks import Chain, find_blocks
from .models.causal import check_tokens
from .models.checkpoint import Checkpoint
from .models.labelled import by_name, placed
from .models.model_files import assemble, tensors_of, with_specs
from .models.sequential import Sequential
from .models.stream import OUTSIDE, Sweeps, parts_of

LADDERS, SHARD, HIDDEN = "ladders.safetensors", "model.safetensors", "hidden.safetensors"


def compress_folder(
    source: str | Path,
    out: str | Path,
    method: Compressor,
    *,
    keep: float,
    data: Tensor | Iterable[Batch] | None = None,
    of: Unit = "params",
    allocate: Allocator | None = None,
    sequential: bool | float = False,
    where: Where | None = None,
    labels: Labels | None = None,
    window: int = 512,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Report:
    """Compress a checkpoint that does not fit in memory; the result is what :func:`compress` and ``save`` make.

    Of mixtures of experts in half precision it is so up to rounding, as gradients are added up in another order.

    In memory are the embeddings, the head, one block, the statistics of one block and the activations of one
    batch. All else is on disk, in the folder ``<out>.partial`` beside ``out``: hidden states and their gradients
    for each block, statistics (for each layer a square of its inputs and one of its outputs in float32, more
    than the weights themselves), and the new shards. Every finished step stays there: the same call continues a
    run that was killed, with the same result bit by bit; ``keep``, ``of``, ``allocate`` and ``sequential`` may
    differ. When ``out`` is complete, that folder is removed.

    Args:
        source: a folder of safetensors, a hub id, or an embedded model, of transformers.
        out: a new or empty folder; it appears when it is complete.
        method: from :mod:`rankwise.compressors`.
        keep: as in :func:`compress`.
        data: token ids, (t,) or (b, t), or batches as the model takes them; None for a method that needs
            none and is not sequential. Sequences cannot be sampled from a model that is not in memory.
        of: as in :func:`compress`.
        allocate: as in :func:`compress`.
        sequential: as in :func:`compress`; then the hidden states of all batches and the inputs of one block's
            layers are in memory too.
        where: as in :func:`compress`; called with the model on the meta device.
        labels: from :mod:`rankwise.core.labels`, or another function of a module; None means labels drawn from
            the model.
        window: as in :func:`calibrate`.
        seed: for the labels.
        dtype: of the weights; None keeps those of the checkpoint.

    Returns:
        the report that :func:`compress` returns.

    Raises:
        ValueError: if an argument is wrong, the checkpoint is damaged, ``out`` is in use, its unfinished run was
            about something else, or the model is no chain of blocks.
        CalibrationError: if the data does not reach any layer of a block, or not one that ``where`` asks for, or
            if a number is not finite.
        OSError: if the disk is full; finished steps are kept.
    """
    check_arguments(method, keep, of, sequential)
    check_seed("seed", seed)
    check_function("allocate", allocate, "a function from rankwise.allocators")
    check_function("labels", labels, "a function from rankwise.core.labels")
    if method.shifts:
        raise ValueError(
            f"{type(method).__name__} gives layers a bias, which a stream cannot; compress the model in memory."
        )
    if method.layers > 1:
        raise ValueError(
            f"{type(method).__name__}(layers={method.layers}) fits blocks together, but a stream holds one at a "
            "time; give layers=1, or compress the model in memory."
        )
    if of not in UNITS:
        raise ValueError(f"a stream is budgeted in {', '.join(UNITS)}, not in {of}.")
    if method.needs and data is None:
        raise ValueError(
            f"{type(method).__name__} needs calibration data, and a streamed model cannot be sampled from; "
            "give token ids or batches as data."
        )
    out = Path(out).resolve()  # a link is followed
    if not Steps.begun(_partial(out)):
        _refuse_used(out)
    if sequential is not False and data is None:
        raise ValueError(
            "a sequential compression runs data through the model; give token ids or batches as data."
        )
    run = _Run(source, out, method, data, where, labels, window, seed, dtype)
    chosen = allocate or (water_filling if method.comparable else uniform)
    with contextlib.closing(run.steps), without_cache(run.model):
        try:
            return run.finish(keep, of, chosen, sequential)
        except ValueError:
            if not run.steps.known:  # such a model or such data cannot be streamed
                run.steps.remove()
            raise


def _partial(out: Path) -> Path:
    """Where the steps of an unfinished run lie."""
    return out.with_name(f"{out.name}.partial")


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; remove it or give another path.")


class _Run:
    """The steps of one streamed compression."""

    def __init__(
        self,
        source: str | Path,
        out: Path,
        method: Compressor,
        data: Tensor | Iterable[Batch] | None,
        where: Where | None,
        labels: Labels | None,
        window: int,
        seed: int,
        dtype: torch.dtype | None,
    ) -> None:
        import transformers

        from . import __version__

        self.out, self.method = out, method
        self.checkpoint = Checkpoint(source, dtype)
        self.model = self.checkpoint.model
        self.sites = select(self.model, where)
        self.chain = Chain(self.model, find_blocks(self.model))
        self.parts = parts_of(self.chain, self.sites)
        batches = [] if data is None else batches_of(data, window=window)
        loss = placed(labels or label_kinds.automatic, self.model, batches)
        batches = by_name(loss, self.model, batches)
        check_tokens(self.model, batches)
        about = {
            "checkpoint": self.checkpoint.identity(),
            "dtype": str(self.checkpoint.dtype),
            "method": described(method),
            "layers": list(self.sites),
            "data": digest_of_batches(batches),
            "labels": told(loss),
            "seed": seed,
            "versions": [__version__, torch.__version__, transformers.__version__],
        }
        self.checkpoint.fill_all_but(self.chain.path)
        self.resident = {name for name, tensor in tensors_of(self.model).items() if not tensor.is_meta}
        self.order: Sequential | None = None
        self.before: dict[str, Any] = {}  # what the shards so far were made of, where the next depend on them
        self.steps = Steps(_partial(out), about)
        self.sweeps = Sweeps(
            self.checkpoint,
            self.chain,
            self.steps,
            batches,
            self.parts,
            method.needs,
            loss,
            seed,
            where is not None,
        )

    def finish(self, keep: float, of: Unit, allocate: Allocator, sequential: bool | float) -> Report:
        """Make every step that is missing, and the folder."""
        self.order = order_of(sequential, self.method, self.sites, lambda: self.chain)
        if self.order is not None:
            self.order.take(self.sweeps.batches)
        if self.method.needs or self.order is not None:
            self.sweeps.run()
        for part in track(self.parts, "factorisation"):
            self._choose(part)
        dense = {name: dense_costs(site.weight) for name, site in self.sites.items()}
        budget = budget_of(keep, sum(each[of] for each in dense.values()))
        ladders = self._ladders(of)
        unreached = {name for part in self.parts if self.parts[part] for name in self._choice(part)["unreached"]}
        picks = spend(allocate, ladders, budget)
        result = {"picks": picks, "sequential": None if self.order is None else self.order.strength}
        there = self.steps.has("assembled") and self.steps.figures("assembled") == result
        if not there:
            _refuse_used(self.out)
        made = [
            self._write(part, {name: (ladders[name], picks[name]) for name in self.parts[part]})
            for part in track(self.parts, "new matrices")  # the part outside comes last
        ]
        rows = {row["name"]: row for each in made for row in each["rows"]}
        costs = {name: cost for each in made for name, cost in each["costs"].items()}
        report = report_of(
            self.method,
            budget_words(keep, of, self.order),
            [rows[name] for name in self.sites],
            {unit: sum(each[unit] for each in dense.values()) for unit in UNITS},
            {unit: sum(each[unit] for each in costs.values()) for unit in UNITS},
            self._seconds(),
            {name: ladder.spectrum.tolist() for name, ladder in ladders.items() if ladder.spectrum is not None},
            [name for name in self.sites if name in unreached],
        )
        if not (there and self.out.exists()):  # else a run was stopped after its very last step
            self._assemble([group for each in made for group in each["groups"]], result)
        self.steps.remove()
        return report

    def _choose(self, part: str) -> None:
        """Keep what the allocator needs to know of the layers of a part."""

        def make(folder: Path) -> dict[str, Any]:
            tensors, totals, unreached = {}, {}, []
            with self._filled(part):
                statistics = self._statistics(part)
                for name, site in self.parts[part].items():
                    choices = choices_of(Together((site,)), self.method, statistics)
                    dense = dense_costs(site.weight)
                    totals[name] = choices.total
                    if self.method.needs and statistics.unreached(name):
                        unreached.append(name)
                    for unit in UNITS:
                        ladder = Ladder.of(choices, unit, dense[unit])
                        parts = {"costs": ladder.costs, "errors": ladder.errors, "index": ladder.index}
                        tensors |= {f"{name} {unit} {key}": value for key, value in parts.items()}
                    if choices.spectrum is not None:
                        tensors[f"{name} spectrum"] = choices.spectrum
            write_tensors(folder / LADDERS, tensors)
            return {"totals": totals, "unreached": unreached}

        if self.parts[part]:
            self.steps.run(f"choices-{self._number(part)}", make)

    def _choice(self, part: str) -> dict[str, Any]:
        return self.steps.figures(f"choices-{self._number(part)}")

    def _ladders(self, of: Unit) -> dict[str, Ladder]:
        """Return the ladders of all layers, in the order of the model."""
        found = {}
        for part, sites in self.parts.items():
            if sites:
                step = f"choices-{self._number(part)}"
                totals, tensors = self._choice(part)["totals"], self.steps.tensors(step, LADDERS)
                for name in sites:
                    costs, errors, index = (tensors[f"{name} {of} {key}"] for key in ("costs", "errors", "index"))
                    found[name] = Ladder(costs, errors, index, totals[name], tensors.get(f"{name} spectrum"))
        return {name: found[name] for name in self.sites}

    def _write(self, part: str, picks: Mapping[str, tuple[Ladder, int]]) -> dict[str, Any]:
        """Make the new matrices of a part and write its shard."""
        chosen = {name: int(ladder.index[i]) for name, (ladder, i) in picks.items() if i < len(ladder.index)}
        if self.order is not None:
            self.before |= {"sequential": self.order.strength, **chosen}

        def make(folder: Path) -> dict[str, Any]:
            rows, costs, groups = [], {}, []
            with self._filled(part), torch.no_grad():
                statistics = self._statistics(part) if chosen else None
                offers: dict[str, Choices] = {}
                fitted, after = self._in_order(part, chosen, statistics, offers)
                for name, (ladder, i) in picks.items():
                    site, group = self.sites[name], Together((self.sites[name],))
                    if statistics is None or name not in chosen:
                        rows.append(row_of(name, site.weight, None, 0.0, 0.0))
                        costs[name] = dense_costs(site.weight)
                        continue
                    choices = offers.get(name) or choices_of(group, self.method, statistics)
                    matrix = fitted[name] if name in fitted else choices.build(chosen[name])
                    rows += rows_of(group, matrix, [matrix], choices, float(ladder.errors[i])).values()
                    costs[name] = matrix_costs(matrix)
                    replace(self.model, site, matrix)
                    groups.append({"names": list(site.names), "spec": matrix.spec()})
                write_tensors(folder / SHARD, self._values(part))
                if after:
                    write_tensors(folder / HIDDEN, after)
            return {"rows": rows, "costs": costs, "groups": groups}

        about = chosen if self.order is None else self.before
        return self.steps.run(f"shard-{self._number(part)}", make, dict(about))

    def _in_order(
        self, part: str, chosen: Mapping[str, int], statistics: Statistics | None, offers: dict[str, Choices]
    ) -> tuple[dict[str, StructuredMatrix], dict[str, Tensor]]:
        """Fit a block to what the compressed ones before it make; return what it makes itself, too.

        The choices of its layers are added to ``offers``.
        """
        if self.order is None or part == OUTSIDE:
            return {}, {}
        i = self.chain.names.index(part)
        dense = self.sweeps.hidden(i)
        left = self.steps.tensors(f"shard-{i - 1}", HIDDEN) if i else {}
        now = [left[str(b)] for b in range(len(dense))] if i else dense

        def fit(name: str, weight: Tensor, new: Stats) -> StructuredMatrix:
            assert statistics is not None
            offers[name] = choices_of(Together((self.sites[name],)), self.method, statistics)
            return offers[name].refit(chosen[name], weight, {**statistics.of(name, self.method.needs), **new})

        fitted, _, after = self.order.block(i, chosen, fit, dense, now)
        return fitted, {str(b): x for b, x in enumerate(after)}

    def _assemble(self, groups: Sequence[Any], result: Mapping[str, Any]) -> None:
        """Put the shards together, noting first what the folder will hold."""
        order = {name: i for i, name in enumerate(self.sites)}
        steps = [f"shard-{self._number(part)}" for part in (OUTSIDE, *self.chain.names)]
        shards = [self.steps.file(step, SHARD) for step in steps]
        config = with_specs(self.checkpoint.config, sorted(groups, key=lambda group: order[group["names"][0]]))
        config.architectures, config.dtype = [type(self.model).__name__], self.checkpoint.dtype
        self.steps.run("assembled", lambda folder: result, result)
        assemble(config, shards, self.checkpoint.folder, self.steps.folder, self.out)

    def _values(self, part: str) -> dict[str, Tensor]:
        """Return the tensors that the shard of a part holds.

        Raises:
            RuntimeError: if one has no values.
        """
        every = tensors_of(self.model)
        inside = {} if part == OUTSIDE else self.model.get_submodule(part).state_dict()
        names = sorted(self.resident) if part == OUTSIDE else []
        if lost := [n for n in names if every[n].is_meta] + [n for n, tensor in inside.items() if tensor.is_meta]:
            raise RuntimeError(
                f"{lost[0]} of {part} has no values: a fault of rankwise; compress in memory instead."
            )
        return {n: t for n, t in every.items() if not t.is_meta and (part == OUTSIDE or n not in self.resident)}

    def _seconds(self) -> dict[str, float]:
        """How long the finished steps took, as in the report of a compression in memory."""
        kinds = {"choices": "factorisation", "shard": "new matrices"}
        found = {"statistics": 0.0, "factorisation": 0.0, "new matrices": 0.0}
        for name, seconds in self.steps.seconds().items():
            found[kinds.get(name.partition("-")[0], "statistics")] += seconds
        return found

    def _statistics(self, part: str) -> Statistics:
        return Statistics(self.sweeps.statistics(part) if self.method.needs else {}, 0.0, 0)

    def _filled(self, part: str) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if part == OUTSIDE else self.checkpoint.filled(part)

    def _number(self, part: str) -> str:
        return "outside" if part == OUTSIDE else str(self.chain.names.index(part))
