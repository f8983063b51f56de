"""What every exported allocator promises."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor

from rankwise import allocators
from rankwise.compressors import PlainSvd
from rankwise.core.choices import Allocator, Ladder, Unit, cost_of, nothing, spend

SHAPES = {"query": (24, 24), "key": (8, 24), "up": (40, 24), "down": (24, 40)}
KEEPS = [0.25, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0]


@pytest.fixture(params=allocators.__all__)
def allocate(request: pytest.FixtureRequest) -> Allocator:
    return getattr(allocators, request.param)


def real(gauge: str = "pivot", unit: Unit = "params") -> dict[str, Ladder]:
    """Ladders of matrices with decaying spectra."""
    ladders = {}
    for seed, (name, (m, n)) in enumerate(SHAPES.items()):
        weight = draw(m, n, seed=seed) * torch.linspace(0, -seed - 1, n).exp()
        choices = PlainSvd(gauge=gauge).choices(weight, {})
        ladders[name] = Ladder.of(choices, unit, m * n * (weight.element_size() if unit == "bytes" else 1))
    return ladders


def invented(seed: int, steps: int = 6, layers: int = 4, *, falling: bool = True) -> dict[str, Ladder]:
    """Ladders of arbitrary costs and errors; a real one's errors fall."""
    generator = Generator().manual_seed(seed)
    ladders = {}
    for i in range(layers):
        costs = torch.randperm(40, generator=generator)[: steps + 1].sort().values + 1
        errors = torch.rand(steps, generator=generator, dtype=torch.float64)
        errors = errors.sort(descending=True).values if falling else errors
        errors = torch.cat([errors, errors.new_zeros(1)])
        ladders[f"layer {i}"] = Ladder(costs, errors, torch.arange(steps), 1.0, errors[:-1].flip(0))
    return ladders


def whole(ladders: Mapping[str, Ladder]) -> int:
    return sum(int(ladder.costs[-1]) for ladder in ladders.values())


def damage(ladders: Mapping[str, Ladder], picks: Mapping[str, int]) -> float:
    return sum(float(ladders[name].errors[i]) for name, i in picks.items())


@pytest.mark.parametrize("gauge", ["pivot", "factors"])
@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
@pytest.mark.parametrize("keep", KEEPS)
def test_the_budget_is_kept(allocate: Allocator, keep: float, unit: Unit, gauge: str):
    ladders = real(gauge, unit)
    budget = int(keep * whole(ladders))
    picks = allocate(ladders, budget)
    assert list(picks) == list(ladders)
    assert all(type(i) is int and 0 <= i < len(ladders[name].costs) for name, i in picks.items())
    assert cost_of(ladders, picks) <= budget
    assert picks == allocate(ladders, budget)


def test_the_whole_budget_leaves_all_layers_dense(allocate: Allocator):
    ladders = real()
    picks = allocate(ladders, whole(ladders))
    assert damage(ladders, picks) == 0


def test_much_of_the_budget_is_spent(allocate: Allocator):
    ladders = real()
    assert cost_of(ladders, allocate(ladders, whole(ladders) // 2)) > 0.4 * whole(ladders)


@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
@pytest.mark.parametrize("gauge", ["pivot", "factors"])
def test_no_choice_is_as_large_as_the_dense_layer(unit: Unit, gauge: str):
    for ladder in real(gauge, unit).values():
        assert bool((ladder.costs[:-1] < ladder.costs[-1]).all())
        assert bool((ladder.costs.diff() > 0).all())
        assert float(ladder.errors[-1]) == 0
        assert len(ladder.index) == len(ladder.costs) - 1


def test_a_budget_too_small_is_an_error(allocate: Allocator):
    ladders = real()
    least = sum(int(ladder.costs[0]) for ladder in ladders.values())
    with pytest.raises(ValueError, match=r"cannot be met.*keep must be at least"):
        allocate(ladders, least - 1)


def test_the_smallest_budget_is_met_or_an_error(allocate: Allocator):
    ladders = real()
    least = sum(int(ladder.costs[0]) for ladder in ladders.values())
    try:
        picks = allocate(ladders, least)
    except ValueError as error:
        assert "keep" in str(error)  # noqa: PT017 (either outcome is right)
        return
    assert cost_of(ladders, picks) == least


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_invented_ladders(allocate: Allocator, seed: int, keep: float):
    ladders = invented(seed)
    budget = int(keep * whole(ladders))
    try:
        picks = allocate(ladders, budget)
    except ValueError as error:
        assert "keep" in str(error)  # noqa: PT017 (either outcome is right)
        return
    assert cost_of(ladders, picks) <= budget


def test_one_layer(allocate: Allocator):
    ladders = {"up": real()["up"]}
    budget = whole(ladders) // 2
    costs = ladders["up"].costs
    assert allocate(ladders, budget) == {"up": int((costs <= budget).sum()) - 1}


@pytest.mark.parametrize("seed", range(40))
def test_uniform_gives_equal_shares_of_what_too_small_layers_leave(seed: int):
    ladders = invented(seed, layers=6)
    least = sum(int(ladder.costs[0]) for ladder in ladders.values())
    for budget in range(least, whole(ladders) + 1):
        picks = allocators.uniform(ladders, budget)
        costs = {name: int(ladders[name].costs[i]) for name, i in picks.items()}
        assert sum(costs.values()) <= budget
        # one share is in accord with all picks: nobody could have more of it, and only the cheapest are above
        dense = {name: int(ladder.costs[-1]) for name, ladder in ladders.items()}
        above = {name for name, i in picks.items() if i == 0}
        more = [
            int(ladders[n].costs[i + 1]) / dense[n] for n, i in picks.items() if i + 1 < len(ladders[n].costs)
        ]
        assert max((costs[n] / dense[n] for n in dense if n not in above), default=0.0) < min(more, default=2.0)
        if all(int(ladder.costs[0]) * whole(ladders) <= budget * dense[n] for n, ladder in ladders.items()):
            share = budget / whole(ladders)
            assert all(c <= share * dense[n] + 1e-9 for n, c in costs.items())


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_water_filling_is_optimal(seed: int, falling: bool):
    ladders = invented(seed, falling=falling)
    every = list(itertools.product(*(range(len(ladder.costs)) for ladder in ladders.values())))
    figures = [
        (cost_of(ladders, p), damage(ladders, p)) for p in (dict(zip(ladders, e, strict=True)) for e in every)
    ]
    least = min(cost for cost, _ in figures)
    for keep in (0.0, 0.1, 0.3, 0.5, 0.8):
        budget = int(least + keep * (whole(ladders) - least))
        best = min(error for cost, error in figures if cost <= budget)
        picks = allocators.water_filling(ladders, budget)
        assert cost_of(ladders, picks) <= budget
        assert damage(ladders, picks) == pytest.approx(best, rel=1e-12)


def test_water_filling_beats_the_others_and_improves_with_the_budget():
    ladders = real()
    before = float("inf")
    for keep in KEEPS:
        budget = int(keep * whole(ladders))
        mine = damage(ladders, allocators.water_filling(ladders, budget))
        for name in allocators.__all__:
            assert mine <= damage(ladders, getattr(allocators, name)(ladders, budget)) + 1e-12
        assert mine <= before
        before = mine


def test_water_filling_does_not_care_about_units_of_error():
    ladders = real()
    scaled = {k: Ladder(v.costs, v.errors * 1e-12, v.index, v.total * 1e-12) for k, v in ladders.items()}
    budget = whole(ladders) // 2
    assert allocators.water_filling(ladders, budget) == allocators.water_filling(scaled, budget)


def test_water_filling_leaves_errors_of_zero_alone():
    zero = {k: Ladder(v.costs, v.errors * 0, v.index, 0.0) for k, v in real().items()}
    picks = allocators.water_filling(zero, whole(zero) // 2)
    assert cost_of(zero, picks) <= whole(zero) // 2


def test_spectrum_threshold_needs_a_spectrum():
    ladders = {k: Ladder(v.costs, v.errors, v.index, v.total) for k, v in real().items()}
    with pytest.raises(ValueError, match="singular values"):
        allocators.spectrum_threshold(ladders, whole(ladders) // 2)


def test_spectrum_threshold_keeps_what_is_above_it():
    weight = torch.diag(torch.tensor([8.0, 7.0, 6.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], dtype=torch.float64))
    for multiple, rank in ((1, 3), (2, 4), (4, 4)):
        choices = PlainSvd(rank_multiple=multiple).choices(weight, {})
        ladders = {"one": Ladder.of(choices, "macs", weight.numel())}
        picks = allocators.spectrum_threshold(ladders, rank * (20 - rank))
        assert choices.build(int(ladders["one"].index[picks["one"]])).rank == rank


def of_spectra(**spectra: Tensor) -> dict[str, Ladder]:
    """Ladders of diagonal weights, whose choices are ranks 1, 2, ..."""
    return {
        name: Ladder.of(PlainSvd(gauge="factors").choices(s.diag(), {}), "params", len(s) ** 2)
        for name, s in spectra.items()
    }


def ranks(share: float, **spectra: Tensor) -> dict[str, int]:
    ladders = of_spectra(**spectra)
    picks = allocators.spectrum_threshold(ladders, int(share * whole(ladders)))
    return {name: pick + 1 for name, pick in picks.items()}


STEEP, SLOW = torch.logspace(0, -3, 32).double(), torch.linspace(1, 0.1, 32).double()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_spectrum_threshold_does_not_care_about_the_size_of_a_weight(share: float):
    found = ranks(share, one=STEEP, other=SLOW)
    assert found["one"] < found["other"]
    assert ranks(share, one=50 * STEEP, other=0.01 * SLOW) == found
    assert len(set(ranks(share, one=SLOW, two=SLOW, three=9 * SLOW).values())) == 1


def test_spectrum_threshold_keeps_more_of_a_larger_budget():
    found = [ranks(share, one=STEEP, other=SLOW) for share in (0.2, 0.35, 0.5, 0.65, 0.8)]
    for less, more in itertools.pairwise(found):
        assert all(less[name] <= more[name] for name in less)
        assert sum(less.values()) < sum(more.values())


def test_one_outlying_value_makes_a_layer_look_low_rank():
    spiked = SLOW.clone()
    spiked[0] = 20
    assert ranks(0.5, one=spiked, other=SLOW)["one"] == 1 < ranks(0.5, one=SLOW, other=SLOW)["one"]


@pytest.mark.parametrize(("share", "rank"), [(0.5, 8), (0.8, 12), (0.9, 14)])
@pytest.mark.parametrize("rounding", [0.0, 1e-16])
def test_equal_values_take_what_can_be_had(share: float, rank: int, rounding: float):
    """Costs are of two factors: rank r takes 2 * 32 r of 32^2 numbers."""
    equal = torch.ones(32).double() - rounding * torch.arange(32)
    assert ranks(share, one=equal) == {"one": rank}


def test_layers_without_a_choice_stay_dense_and_count(allocate: Allocator):
    found = real()
    fixed = Ladder.of(nothing(), "params", 1000)
    budget = 1000 + int(0.7 * whole(found))
    picks = spend(allocate, {"fixed": fixed, **found}, budget)
    assert picks == {"fixed": 0, **allocate(found, budget - 1000)}
    with pytest.raises(ValueError, match="cannot be met"):
        spend(allocate, {"fixed": fixed, **found}, 1000)


def test_an_allocator_that_spends_too_much_is_named():
    with pytest.raises(RuntimeError, match="spent"):
        spend(lambda found, _: {name: len(each.costs) - 1 for name, each in found.items()}, real(), 900)
