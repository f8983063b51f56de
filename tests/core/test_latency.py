"""Budgets of time, with a timer that is told what to find."""

from collections.abc import Sequence

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill
from torch import nn

import rankwise
from rankwise.compressors import Gptq, GptqPlusLowRank, KroneckerFactoredSvd, Mixed, PlainSvd, WhitenedSvd
from rankwise.core.choices import Ladder
from rankwise.core.latency import latencies, time_matrices
from rankwise.matrices import Dense, LowRank, Quantized, StructuredMatrix


def by_macs(matrices: Sequence[StructuredMatrix]) -> list[float]:
    return [10.0 * matrix.macs for matrix in matrices]


class Recording:
    """Times by multiply-adds, low-bit matrices slower than dense ones, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Sequence[StructuredMatrix]] = []

    def __call__(self, matrices: Sequence[StructuredMatrix]) -> list[float]:
        self.calls.append(matrices)
        return [
            matrix.macs * (3.0 if any(isinstance(part, Quantized) for part in matrix.modules()) else 0.5)
            for matrix in matrices
        ]


def stats(m: int, n: int):
    return fill(KroneckerFactoredSvd.needs, correlated(200, n, 1), correlated(200, m, 2))


def test_costs_in_between_follow_the_multiply_adds():
    weight = draw(60, 50)
    choices = PlainSvd().choices(weight, {})
    timer = Recording()
    (found,) = latencies({"a": choices}, {"a": weight}, timer).values()
    assert found.dense == 60 * 50 // 2
    exact = torch.tensor([round(0.5 * macs) for macs in choices.costs["macs"].tolist()])
    as_large = choices.costs["bytes"] >= 8 * 60 * 50
    exact[as_large] = exact[as_large].clamp_min(found.dense)
    assert int((found.costs - exact).abs().max()) <= 1
    assert 10 <= len(timer.calls[0]) <= 20  # of 50 ranks
    ranks = [matrix.rank for matrix in timer.calls[0][1:]]
    assert (min(ranks), max(ranks)) == (1, 50)


def test_layers_of_one_shape_are_timed_once():
    timer, method = Recording(), WhitenedSvd()
    weights = {f"{i}": draw(*shape, seed=i) for i, shape in enumerate([(30, 20), (30, 20), (20, 30), (30, 20)])}
    offers = {name: method.choices(weight, stats(*weight.shape)) for name, weight in weights.items()}
    found = latencies(offers, weights, timer)
    assert len(timer.calls) == 2
    assert found["0"] is found["1"] is found["3"]
    assert found["0"].table[0] == {"shape": [30, 20], "kind": "Dense", "rank": 20, "ns_per_row": 300.0}
    assert {row["kind"] for row in found["0"].table[1:]} == {"PivotedLowRank"}


def test_unlike_structures_are_not_mixed_up():
    """Between the last low-rank choice and the first low-bit one nothing is filled in."""
    weight, timer = draw(64, 48), Recording()
    methods = (KroneckerFactoredSvd(), Gptq(group=8), GptqPlusLowRank(group=8, rank_multiple=2))
    choices = Mixed(methods=methods).choices(weight, stats(64, 48))
    (found,) = latencies({"a": choices}, {"a": weight}, timer).values()
    low_bit = torch.tensor(
        [
            any(isinstance(part, Quantized) for part in choices.build(i).modules())
            for i in range(len(choices.errors))
        ]
    )
    exact = choices.costs["macs"] * torch.where(low_bit, 3.0, 0.5)
    as_large = choices.costs["bytes"] >= 8 * 64 * 48
    exact[as_large] = exact[as_large].clamp_min(found.dense)
    assert float((found.costs - exact).abs().max()) <= 1
    assert len(timer.calls[0]) < len(choices.errors) / 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 12))


def test_a_budget_of_time_is_kept():
    report = rankwise.compress(net(), PlainSvd(), keep=0.5, of="latency", timer=by_macs)
    same = rankwise.compress(net(), PlainSvd(), keep=0.5, of="macs")
    assert report.totals["keep"]["latency"] <= 0.5
    assert report.totals["keep"]["latency"] == pytest.approx(report.totals["keep"]["macs"], abs=0.01)
    assert [row["rank"] for row in report.rows] == pytest.approx([row["rank"] for row in same.rows], abs=1)
    assert {tuple(row["shape"]) for row in report.totals["timings"]} == {(40, 40), (12, 40)}
    assert report.totals["seconds"]["timing"] >= 0
    assert "timings" not in same.totals
    assert "timings" in report.to_json()


def test_what_is_slower_than_dense_is_never_chosen():
    def slow(matrices: Sequence[StructuredMatrix]) -> list[float]:
        return [100.0 if isinstance(matrix, Dense) else 101.0 for matrix in matrices]

    report = rankwise.compress(net(), PlainSvd(), keep=1.0, of="latency", timer=slow)
    assert {row["kind"] for row in report.rows} == {"Dense"}
    with pytest.raises(ValueError, match="nothing smaller than the dense layers in this unit"):
        rankwise.compress(net(), PlainSvd(), keep=0.9, of="latency", timer=slow)


def test_what_is_as_large_as_dense_is_never_chosen_however_fast():
    def lucky(matrices: Sequence[StructuredMatrix]) -> list[float]:
        return [100.0 if isinstance(matrix, Dense) else 1.0 for matrix in matrices]

    model = nn.Sequential(nn.Linear(40, 40))
    report = rankwise.compress(model, PlainSvd(gauge="factors"), keep=0.9, of="latency", timer=lucky)
    assert report.rows[0]["rank"] == 19  # 19 * 80 < 40 * 40


def test_noise_in_the_times_does_no_harm():
    """A larger rank that happened to be faster makes the smaller ones pointless."""

    def noisy(matrices: Sequence[StructuredMatrix]) -> list[float]:
        return [50.0 if 10 <= matrix.rank <= 20 else 10.0 * matrix.rank for matrix in matrices]

    for allocate in (rankwise.allocators.greedy, rankwise.allocators.uniform, rankwise.allocators.water_filling):
        model = nn.Sequential(nn.Linear(40, 40))
        report = rankwise.compress(model, PlainSvd(), keep=0.2, of="latency", timer=noisy, allocate=allocate)
        assert report.rows[0]["rank"] >= 18


def test_a_ladder_leaves_out_what_is_dominated():
    offer = PlainSvd().choices(draw(12, 12), {})
    costs, errors = torch.tensor([5, 5, 7, 6, 9, 99]), torch.tensor([4.0, 3.0, 3.0, 2.0, 2.0, 0.5]).double()
    choices = type(offer)({"macs": costs}, errors, 9.0, offer.build, offer.refit, offer.error_of)
    ladder = Ladder.of(choices, "macs", 50)
    assert ladder.index.tolist() == [1, 3]
    assert ladder.costs.tolist() == [5, 6, 50]
    assert ladder.errors.tolist() == [3.0, 2.0, 0.0]


def test_the_real_timer_times_every_matrix():
    matrices = [Dense(torch.ones(64, 64)), LowRank(torch.ones(64, 1), torch.ones(1, 64))]
    found = time_matrices(matrices, rows=3, repeats=2)
    assert len(found) == 2
    assert all(each > 0 for each in found)
