"""Make a model of transformers narrower: an ordinary architecture with fewer neurons and heads in every block."""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import Data, calibrate
from .compression import check_keep, check_weights
from .compressors.loss_metric import LossMetric, Regularisers
from .core.choices import UNITS, budget_of, least_keep
from .core.data import batches_of
from .core.errors import CalibrationError
from .core.labels import Labels
from .core.memory import peak_memory_bytes
from .core.progress import track
from .core.report import Report
from .core.statistics import Batch, InputGram, InputMean, OutputGradGram, Statistic, Statistics, Stats
from .core.surgery import Site, Where, select, structured
from .linalg import Metric, eliminate_columns, metric_norm, refit_columns
from .models.causal import reads_tokens_alone
from .models.exchange import Exchange, parameters_of, readable, same_outputs
from .models.widths import Width, find_widths


def narrow(
    model: nn.Module,
    *,
    keep: float,
    data: Data = "self",
    regularisers: Regularisers | None = None,
    multiple_of: int = 32,
    where: Where | None = None,
    labels: Labels | None = None,
    tokens: int = 24576,
    window: int = 512,
    seed: int = 0,
) -> Report:
    """Drop neurons and heads of a model of transformers, in place, and have the others take over what they did.

    The result is an ordinary model with smaller numbers in its config: it needs no rankwise to be loaded, and can
    be compressed further.

    Queries, keys and values, or gate and up, are the producers of what one matrix W of the block reads, input by
    input. Without the inputs of some units the best matrix on the others, K, is W C[:, K] C[K, K]^-1, and the
    loss changes by about 1/2 tr(S D C D'), D being the change of W (see :class:`KroneckerFactoredSvd`). Units
    leave each block in the order that this says, and as an architecture has one width for all blocks, the widths
    are those whose errors, summed over the blocks, are least within the budget. Where W has a bias, it takes over
    the mean of what the dropped inputs contributed.

    Units are single neurons, and of attention whole key-value heads with the query heads that share them: an
    ordinary architecture has one size for all heads, of queries, keys and values alike, rotary embeddings tie
    the coordinates of a head together, and where no field of the config can hold that size (GPT-2, NeoX, BERT)
    the number of heads cannot change at all and attention stays as it is. So do the neurons of a
    mixture's experts.

    Nothing in the model changes before everything is made and tried, so an interrupt or an error leaves it whole.

    Args:
        model: of transformers, not compressed so far.
        keep: stored numbers of the selected layers afterwards, as a share of those before; 0 < keep <= 1. Bytes
            and multiply-adds shrink with them.
        data: as in :func:`compress`. Of statistics, those that :class:`KroneckerFactoredSvd` needs are taken, and
            ``InputMean`` where W has a bias.
        regularisers: of the two second moments, a ``rankwise.compressors.loss_metric.Regularisers``.
        multiple_of: numbers of neurons are multiples of it. Processors prefer multiples of 32 or more, and the
            low-bit blocks of GGUF hold 32 or 256 neurons.
        where: which layers may shrink, and count for ``keep``; None means all weight matrices but embeddings and
            output heads. Units leave only where all their matrices may shrink.
        labels: as in :func:`calibrate`.
        tokens: as in :func:`calibrate`.
        window: as in :func:`calibrate`.
        seed: as in :func:`calibrate`.

    Returns:
        a report with a row for each consumer W: units and params, of the whole unit, before and after, and the
        error that was predicted and the one measured on the new matrix, in nats per token.

    Raises:
        TypeError: if the model is not one of transformers.
        ValueError: if an argument is wrong, a weight is not finite, no number of the config counts units that can
            be dropped, or the budget cannot be met.
        CalibrationError: if the data is empty or does not reach a layer.

    References: Lin et al., "MoDeGPT: modular decomposition for large language model compression", 2024,
        arXiv 2408.09632 (the refit, with S = I, one-shot scores and a width of its own for each block); Kurtic,
        Frantar and Alistarh, "ZipLM", 2023, arXiv 2302.04089 (units that leave one by one).
    """
    _check_arguments(model, keep, multiple_of)
    regularisers = regularisers or Regularisers()
    sites = select(model, where)
    check_weights(sites)
    if not isinstance(data, (str, Tensor, Statistics)):
        data = batches_of(data)
    start = time.perf_counter()
    probe = _probe(model, data)
    before = sum(site.weight.numel() for site in sites.values())
    excess = before - budget_of(keep, before)
    offers = [_Offer.of(model, width, sites, multiple_of) for width in find_widths(model, sites, probe)]
    offers = _enough(offers, excess, before)
    seconds = {"structure": time.perf_counter() - start}
    names = {name for offer in offers for name in offer.width.blocks}
    if not isinstance(data, Statistics):
        needs = dict.fromkeys(need for name in names for need in _needs(sites[name]))
        options: dict[str, Any] = {"labels": labels, "tokens": tokens, "window": window, "seed": seed}
        data = calibrate(model, list(needs), data=data, where=lambda name, _: name in names, **options)
    seconds["statistics"] = data.seconds
    start = time.perf_counter()
    readers = {
        name: _Reader.of(name, sites[name], data, regularisers, offer)
        for offer in offers
        for name in track(offer.width.blocks, f"order of {offer.width.name}")
    }
    seconds["elimination"] = time.perf_counter() - start
    start = time.perf_counter()
    picks = _best(model, offers, readers, excess)
    numbers, words = _numbers(picks), ", ".join(f"{offer.width.name} {count}" for offer, count in picks)
    change = _Change(parameters_of(model), {}, {})
    rows = [
        change.shrink(name, readers[name], offer, count)
        for offer, count in picks
        for name in track(offer.width.blocks, f"new {offer.width.name}")
    ]
    exchange = Exchange(model, numbers, change.tensors)
    if not same_outputs(model, probe, exchange, change.padded):
        raise ValueError(f"with {words} the model computes something else; leave layers out with 'where'.")
    exchange.apply()
    seconds["new matrices"] = time.perf_counter() - start
    after = before - sum(offer.saved(count) for offer, count in picks)
    totals = {
        "method": {"name": "narrow"} | dataclasses.asdict(regularisers),
        "widths": {offer.width.name: [offer.width.count, count] for offer, count in picks},
        "keep": dict.fromkeys(UNITS, after / before),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return Report(f"narrow: {words} at keep {keep:g}", rows, "layers", totals)


@dataclass(frozen=True)
class _Offer:
    """The numbers of units that a width may have.

    Args:
        width: the number.
        counts: what it may be, increasing; the last is what it is.
        params: stored numbers of one unit, of all blocks.
    """

    width: Width
    counts: Sequence[int]
    params: int

    @classmethod
    def of(cls, model: nn.Module, width: Width, sites: Mapping[str, Site], multiple_of: int) -> "_Offer":
        """Offer multiples of single neurons, and as many groups of heads as transformers reads from a config."""
        if width.size == 1:
            counts = list(range(multiple_of, width.count, multiple_of))
        else:
            counts = [count for count in range(1, width.count) if readable(model, width.numbers(count))]
        stored = sum(site.weight.numel() for name, site in sites.items() if f"{name}.weight" in width.cuts)
        return cls(width, [*counts, width.count], stored // width.count)

    def saved(self, count: int) -> int:
        """How many stored numbers go where so many units stay."""
        return (self.width.count - count) * self.params


@dataclass(frozen=True)
class _Reader:
    """The matrix of a block that reads units, and what it costs to do without some.

    Args:
        site: the matrix.
        stats: about it.
        regularisers: of them.
        order: the units that can leave, first to last.
        errors: predicted after each, from 0.
    """

    site: Site
    stats: Stats
    regularisers: Regularisers
    order: Tensor
    errors: Tensor

    @classmethod
    def of(
        cls, name: str, site: Site, statistics: Statistics, regularisers: Regularisers, offer: _Offer
    ) -> "_Reader":
        """Let units leave until the fewest are left that are offered."""
        stats, width = statistics.of(name, _needs(site)), offer.width
        try:
            outputs, inputs = _metrics(site, stats, regularisers)
            order, costs = eliminate_columns(site.weight, outputs, inputs, size=width.size, least=offer.counts[0])
        except ValueError as error:
            raise CalibrationError(f"layer {name}: {error} Or leave the layer out with 'where'.") from error
        return cls(site, stats, regularisers, order, LossMetric.scale * costs)

    def kept(self, width: Width, count: int) -> Tensor:
        """Return the units that stay, (count,), in the order of the model."""
        stay = torch.ones(width.count, dtype=torch.bool)
        stay[self.order[: width.count - count].cpu()] = False
        return stay.nonzero()[:, 0]

    def refit(self, places: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """Return the matrix (m, r) on some inputs (r,), how far the bias moves, and the loss change in nats."""
        weight = self.site.weight
        outputs, inputs = _metrics(self.site, self.stats, self.regularisers)
        new = refit_columns(weight, inputs, places.to(weight.device)).to(weight.dtype)
        change = weight.to(torch.float64, copy=True)
        change[:, places] -= new.double()
        shift = None if self.site.unbiased else change @ self.stats[InputMean].value()
        return new, shift, LossMetric.scale * metric_norm(change, outputs, inputs)


@dataclass(frozen=True)
class _Change:
    """New parameters of a model.

    Args:
        parameters: the model's own.
        tensors: the new ones.
        padded: what computes the same in the sizes of before.
    """

    parameters: Mapping[str, Tensor]
    tensors: dict[str, Tensor]
    padded: dict[str, Tensor]

    def shrink(self, name: str, reader: _Reader, offer: _Offer, count: int) -> dict[str, Any]:
        """Add those of one block, and return its row of the report."""
        width, error = offer.width, 0.0
        if count < width.count:
            cuts, units = width.blocks[name], reader.kept(width, count)
            self.tensors.update({key: cut.part(self.parameters[key], units) for key, cut in cuts.items()})
            cut, key = cuts[f"{name}.weight"], f"{name}.weight"
            weight, shift, error = reader.refit(cut.places(units))
            self.tensors[key] = reader.site.view.restore(weight, None).get_parameter("weight").detach()
            self.padded[key] = cut.spread(self.tensors[key], units, self.parameters[key])
            if shift is not None:
                bias = self.parameters[f"{name}.bias"].detach()
                self.tensors[f"{name}.bias"] = self.padded[f"{name}.bias"] = (bias + shift).to(bias.dtype)
        each = offer.params // len(width.blocks)
        return {
            "name": name,
            "kind": width.name,
            "units_before": width.count,
            "units_after": count,
            "params_before": width.count * each,
            "params_after": count * each,
            "predicted_error": float(reader.errors[width.count - count]),
            "measured_error": error,
        }


def _check_arguments(model: nn.Module, keep: float, multiple_of: int) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be one of transformers, got {type(model).__name__}; use rankwise.compress.")
    if structured(model):
        raise ValueError(
            "the model is compressed already; narrow a model before it is compressed, or fold it first."
        )
    check_keep(keep)
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}.")


def _probe(model: Any, data: str | Tensor | Sequence[Batch] | Statistics) -> Batch:
    """Return what changes of the model are tried on: a few tokens, or the first batch."""
    if not isinstance(data, (str, Tensor, Statistics)):
        return data[0]
    if reads_tokens_alone(model):
        return torch.arange(32)[None] % model.get_input_embeddings().num_embeddings
    raise ValueError(f"{type(model).__name__} takes more than token ids; give data as a list of batches.")


def _needs(site: Site) -> tuple[type[Statistic], ...]:
    return (*LossMetric.needs, *(() if site.unbiased else (InputMean,)))


def _metrics(site: Site, stats: Stats, regularisers: Regularisers) -> tuple[Metric, Metric]:
    """Return S and C, of inputs without their mean where a bias can make up for it."""
    moment = stats[InputGram].value()
    if not site.unbiased:
        mean = stats[InputMean].value()
        moment -= mean[:, None] * mean
    return regularisers.regularised(stats[OutputGradGram].value(), moment)


def _enough(offers: Sequence[_Offer], excess: int, before: int) -> list[_Offer]:
    """Leave out counts that are smaller than a budget ever needs.

    Raises:
        ValueError: if the budget cannot be met.
    """
    most = sum(offer.saved(offer.counts[0]) for offer in offers)
    if most < excess:
        left = before - most
        raise ValueError(
            f"the budget cannot be met: {', '.join(f'{o.width.name} {o.counts[0]}' for o in offers)} leaves "
            f"{left} of {before} stored numbers; keep must be at least {least_keep(left, before)}."
        )
    enough = []
    for offer in offers:
        alone = [count for count in offer.counts if offer.saved(count) >= excess]
        enough.append(dataclasses.replace(offer, counts=offer.counts[max(len(alone) - 1, 0) :]))
    return enough


def _best(
    model: nn.Module, offers: Sequence[_Offer], readers: Mapping[str, _Reader], excess: int
) -> list[tuple[_Offer, int]]:
    """Return the count of each width that together save enough with the least error that is predicted.

    Raises:
        ValueError: if transformers reads none of the configs that would do.
    """
    errors = [
        {
            n: sum(float(readers[name].errors[offer.width.count - n]) for name in offer.width.blocks)
            for n in offer.counts
        }
        for offer in offers
    ]
    ranked = sorted(
        (sum(each[n] for each, n in zip(errors, counts, strict=True)), -saved, counts)
        for counts in itertools.product(*(offer.counts for offer in offers))
        if (saved := sum(offer.saved(n) for offer, n in zip(offers, counts, strict=True))) >= excess
    )
    for _, _, counts in ranked:
        picks = list(zip(offers, counts, strict=True))
        if readable(model, _numbers(picks)):
            return picks
    raise ValueError("transformers reads no config with numbers so small; give a larger keep.")


def _numbers(picks: Sequence[tuple[_Offer, int]]) -> dict[tuple[str, ...], int]:
    """Return the fields of the config, of those widths that change."""
    smaller = [(offer.width, count) for offer, count in picks if count < offer.width.count]
    return {path: value for width, count in smaller for path, value in width.numbers(count).items()}
