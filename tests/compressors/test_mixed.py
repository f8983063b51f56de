"""Low-bit, sparse and mixed methods: what they offer, and what an allocator does with it."""

import itertools

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill

from rankwise.allocators import water_filling
from rankwise.compressors import (
    Gptq,
    GptqPlusLowRank,
    KroneckerFactoredRounding,
    KroneckerFactoredSvd,
    Mixed,
    OrthogonalDictionary,
    PlainSvd,
)
from rankwise.compressors.loss_metric import LossMetric
from rankwise.core.choices import Choices, Ladder, Unit
from rankwise.matrices import Quantized

SHAPES = [(48, 24), (24, 48), (32, 32)]
PARTS = (KroneckerFactoredSvd(), OrthogonalDictionary(), Gptq(group=8), GptqPlusLowRank(group=8, rank_multiple=2))


def offers(method: LossMetric | Mixed) -> list[tuple[Choices, int]]:
    """Choices for some weights, and how many numbers each weight has."""
    found = []
    for seed, (m, n) in enumerate(SHAPES):
        weight = draw(m, n, seed=seed) * (seed + 1)
        stats = fill(LossMetric.needs, correlated(300, n, seed), correlated(300, m, seed + 9))
        found.append((method.choices(weight, stats), weight.numel()))
    return found


def least_error(method: LossMetric | Mixed, unit: Unit, keep: float) -> float:
    """The damage of spending ``keep`` of three layers' size."""
    size = 8 if unit == "bytes" else 1
    ladders = {
        str(i): Ladder.of(choices, unit, size * numbers) for i, (choices, numbers) in enumerate(offers(method))
    }
    budget = int(keep * sum(int(ladder.costs[-1]) for ladder in ladders.values()))
    return sum(float(ladders[name].errors[i]) for name, i in water_filling(ladders, budget).items())


@pytest.mark.parametrize(("unit", "keep"), [("bytes", 0.4), ("params", 0.6), ("macs", 0.6)])
def test_a_mix_is_at_least_as_good_as_its_parts(unit: Unit, keep: float):
    mixed = least_error(Mixed(methods=PARTS), unit, keep)
    low_rank = least_error(PARTS[0], unit, keep)
    assert mixed <= low_rank
    if unit == "bytes":
        assert mixed < 0.1 * low_rank
        assert mixed <= least_error(PARTS[2], unit, keep)


def test_a_mix_builds_what_it_offers():
    ((choices, _), *_), ((part, _), *_) = offers(Mixed(methods=PARTS)), offers(PARTS[2])
    place = len(choices.errors) - len(offers(PARTS[3])[0][0].errors) - len(part.errors)
    built = choices.build(place)
    assert isinstance(built, Quantized)
    assert torch.equal(built.dense(), part.build(0).dense())
    assert float(choices.errors[place]) == float(part.errors[0])


def test_a_mix_of_different_metrics_is_refused():
    with pytest.raises(ValueError, match="same input_shrinkage"):
        Mixed(methods=(Gptq(), KroneckerFactoredSvd(input_shrinkage=0.1)))
    with pytest.raises(ValueError, match="by the loss"):
        Mixed(methods=(Gptq(), PlainSvd()))  # pyright: ignore[reportArgumentType]


def test_more_bits_err_less_and_a_low_rank_term_helps():
    for (choices, _), (corrected, _) in zip(offers(PARTS[2]), offers(PARTS[3]), strict=True):
        errors = choices.errors.tolist()  # 2, 3, 4, 5, 6 and 8 bits
        assert all(more < 0.5 * fewer for fewer, more in itertools.pairwise(errors))
        widths = corrected.errors.view(3, -1)  # 2, 3 and 4 bits, each with ranks
        assert bool((widths[:, 0] < choices.errors[:3]).all())
        assert bool((widths.diff(dim=1) < 0).all())


def test_low_bits_never_count_as_fewer_numbers():
    for choices, numbers in offers(PARTS[2]):
        assert bool((choices.costs["params"] > numbers).all())
        assert bool((choices.costs["bytes"] < 8 * numbers).all())


def test_rounding_in_the_whole_metric_beats_feedback_over_columns():
    whole, columns = KroneckerFactoredRounding(group=8), Gptq(group=8)
    ratios = [
        ours / theirs
        for (one, _), (other, _) in zip(offers(whole), offers(columns), strict=True)
        for ours, theirs in zip(one.errors.tolist(), other.errors.tolist(), strict=True)
    ]
    assert sum(ratios) / len(ratios) < 0.8


@pytest.mark.parametrize("method", [Gptq(group=32), KroneckerFactoredRounding(group=32)])
def test_large_weights_have_their_errors_predicted(method: LossMetric):
    weight = draw(256, 256, dtype=torch.float32)
    stats = fill(LossMetric.needs, correlated(2000, 256, 3), correlated(2000, 256, 5))
    choices = method.choices(weight, stats)
    for i in range(len(choices.errors)):
        measured = choices.error_of(weight - choices.build(i).dense().detach())
        assert measured == pytest.approx(float(choices.errors[i]), rel=0.35)
