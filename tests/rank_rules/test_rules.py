"""Rank rules against what they say ranks are worth."""

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, exactly, fill
from torch import Tensor

from rankwise.allocators import water_filling
from rankwise.core.choices import Ladder, spend
from rankwise.core.statistics import InputGram, OutputGradGram, Stats, WeightGradient
from rankwise.matrices import Dense
from rankwise.rank_rules import ExplainedVariance, PredictedDecrease, SpectralEnergy


def spread(missed: dict[str, Tensor], budget: int) -> dict[str, int]:
    ladders = {
        name: Ladder(torch.arange(len(left)), left, torch.arange(len(left) - 1), float(left[0]))
        for name, left in missed.items()
    }
    return spend(water_filling, ladders, budget)


def test_the_decrease_is_that_of_the_best_step():
    """Found by minimising the quadratic model over both factors, from several starts, without an SVD."""
    m, n, damping = 6, 5, 0.1
    x, g = correlated(80, n, 3), correlated(80, m, 4)
    rule = PredictedDecrease(input_damping=damping, output_damping=damping)
    missed = rule.missed(Dense(draw(m, n)), fill(rule.needs, x, g), 5)
    slope, bare = g.mT @ x / 80, (x.mT @ x / 80, g.mT @ g / 80)
    c, s = (each + damping * each.diagonal().mean() * torch.eye(len(each)) for each in bare)
    noise = 0.5 / 80
    for each, damped in zip(bare, (c, s), strict=True):
        noise *= float(torch.trace(torch.linalg.solve(damped, each)))
    total = 0.5 * float(torch.trace(slope.mT @ torch.linalg.solve(s, slope) @ torch.linalg.inv(c)))
    sound = 1 - noise / total
    assert 0.1 < sound < 1
    for r in (1, 2, 3):
        least = 0.0
        for seed in range(3):
            left, right = (1e-1 * draw(*sizes, seed=seed) for sizes in ((m, r), (r, n)))
            for _ in range(60):  # each factor has a linear system for its best value
                inner = right @ c @ right.mT
                left = -torch.linalg.solve(s, slope) @ right.mT @ torch.linalg.inv(inner)
                outer = left.mT @ s @ left
                right = -torch.linalg.inv(outer) @ left.mT @ torch.linalg.solve(c, slope.mT).mT
            change = left @ right
            value = (slope * change).sum() + 0.5 * torch.trace(s @ change @ c @ change.mT)
            least = min(least, float(value))
        assert float(missed[0] - missed[r]) == pytest.approx(-sound * least, rel=1e-5)


def test_identity_metrics_leave_the_singular_values_of_the_gradient():
    gradient = draw(6, 5)
    stats: Stats = {
        InputGram: exactly(InputGram, torch.eye(5)),
        OutputGradGram: exactly(OutputGradGram, torch.eye(6)),
        WeightGradient: exactly(WeightGradient, gradient * 10**12),
    }
    stats[WeightGradient].count = 10**12  # so many rows that there is no noise
    missed = PredictedDecrease(input_damping=0, output_damping=0).missed(Dense(draw(6, 5)), stats, 5)
    squares = torch.linalg.svdvals(gradient).square()
    torch.testing.assert_close(missed, 0.5 * torch.stack([squares[r:].sum() for r in range(6)]))


def test_a_layer_without_a_gradient_gets_nothing_of_what_others_can_use():
    """The negative control: gradients with no part in common with the inputs, beside those of a regression."""
    rule, x = PredictedDecrease(), torch.linalg.qr(draw(80, 13, seed=1))[0] * 80**0.5
    noise = x[:, 5:]  # uncorrelated with the first five columns, exactly
    missed = {
        "useful": rule.missed(Dense(draw(6, 5)), fill(rule.needs, x[:, :5], x[:, :5] @ draw(5, 6, seed=2)), 4),
        "useless": rule.missed(Dense(draw(8, 5)), fill(rule.needs, x[:, :5], noise), 4),
    }
    assert float(missed["useless"][0]) < 1e-9 * float(missed["useful"][0])
    assert spread(missed, 4) == {"useful": 4, "useless": 0}


def test_noise_is_not_taken_for_worth():
    """Gradients that have nothing to do with the inputs but by chance, whatever the size of the layer."""
    for m, n, t in ((8, 6, 2000), (20, 16, 500)):
        rule, found = PredictedDecrease(input_damping=0, output_damping=0), []
        for seed in range(20):
            stats = fill(rule.needs, correlated(t, n, 3 + 7 * seed), correlated(t, m, 6 + 7 * seed))
            found.append(float(rule.missed(Dense(draw(m, n)), stats, 1)[0]))
        assert sum(found) / 20 < 0.15 * (0.5 * m * n / t)  # what it would look worth


def power_law(decay: float, size: int = 40) -> Dense:
    u, v = (torch.linalg.qr(draw(size, size, seed=seed))[0] for seed in (1, 2))
    return Dense(u * torch.arange(1, size + 1, dtype=torch.float64) ** (-decay / 2) @ v)


def test_flat_spectra_get_more_ranks_than_steep_ones():
    rule, decays = SpectralEnergy(), [0.0, 0.5, 1.0, 1.5, 2.0]
    missed = {str(decay): rule.missed(power_law(decay), {}, 20) for decay in decays}
    energies = [float((-missed[str(decay)][8]).exp()) for decay in decays]
    assert energies == sorted(energies)  # at the target rank
    ranks = list(spread(missed, 8 * len(decays)).values())
    assert sum(ranks) == 8 * len(decays)
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > 8 > ranks[-1] >= 1


def test_energy_itself_would_starve_flat_layers():
    rule = SpectralEnergy()
    missed = {"flat": rule.missed(power_law(0, 80), {}, 16), "falling": rule.missed(power_law(1, 80), {}, 16)}
    ours = spread(missed, 16)
    plain = spread({name: 1 - (-left).exp() for name, left in missed.items()}, 16)
    assert ours["flat"] > ours["falling"]
    assert plain["flat"] <= 1 < plain["falling"]


def test_every_layer_gets_a_rank_before_any_gets_two():
    rule = SpectralEnergy()
    missed = {"flat": rule.missed(power_law(0), {}, 5), "steep": rule.missed(power_law(9), {}, 5)}
    assert spread(missed, 2) == {"flat": 1, "steep": 1}


@pytest.mark.parametrize("centred", [True, False])
def test_explained_variance_is_a_share_of_the_layer_s_own(centred: bool):
    """Whatever the size of its inputs."""
    rule, x = ExplainedVariance(centred=centred), correlated(200, 9, 1) + 0.2 * draw(1, 9, seed=2)
    energies = torch.linalg.svdvals(x - x.mean(0) * centred).square()
    wanted = torch.stack([energies[r:].sum() / energies.sum() for r in range(6)])
    for size in (1.0, 30.0):
        missed = rule.missed(Dense(draw(4, 9)), fill(rule.needs, size * x, torch.zeros(200, 4)), 5)
        torch.testing.assert_close(missed, wanted, rtol=1e-3, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="input_damping"):
        PredictedDecrease(input_damping=-1)
    with pytest.raises(ValueError, match="output_damping"):
        PredictedDecrease(output_damping=-1)
    with pytest.raises(ValueError, match="no spectrum"):
        SpectralEnergy().missed(Dense(torch.zeros(3, 3)), {}, 2)
