"""Sparse codes over atoms that are orthonormal in a metric."""

import functools
import itertools

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated
from torch import Tensor

from rankwise.linalg import Metric, largest, metric_norm, metric_svd, orthogonal_dictionary


def moment(n: int, seed: int) -> Tensor:
    rows = correlated(300, n, seed)
    return rows.mT @ rows / len(rows)


def keep(count: int):
    return functools.partial(largest, kept=count)


METRICS = {
    "identity": lambda: (Metric(), Metric()),
    "full": lambda: (Metric(moment(14, 1), 0.05), Metric(moment(10, 2), 1e-6)),
    "diagonal": lambda: (Metric(moment(14, 1).diagonal()), Metric(moment(10, 2).diagonal())),
}


@pytest.fixture(params=METRICS)
def metrics(request: pytest.FixtureRequest) -> tuple[Metric, Metric]:
    return METRICS[request.param]()


def test_all_entries_kept_is_the_best_low_rank_matrix(metrics: tuple[Metric, Metric]):
    weight = draw(14, 10)
    codes, mask, atoms = orthogonal_dictionary(weight, *metrics, atoms=4, choose=keep(14 * 4))
    assert bool(mask.all())
    left_out = float(metric_svd(weight, *metrics)[1][4:].square().sum())
    assert metric_norm(weight - codes @ atoms, *metrics) == pytest.approx(left_out, rel=1e-9)


def test_places_and_orthonormality(metrics: tuple[Metric, Metric]):
    codes, mask, atoms = orthogonal_dictionary(draw(14, 10), *metrics, atoms=7, choose=keep(50))
    assert int(mask.sum()) == 50
    assert not bool(codes[~mask].any())
    white = metrics[1].whiten(atoms.mT)
    torch.testing.assert_close(white.mT @ white, torch.eye(7, dtype=torch.float64))


def test_more_steps_are_never_worse(metrics: tuple[Metric, Metric]):
    weight = draw(14, 10)

    def error(steps: int) -> float:
        codes, _, atoms = orthogonal_dictionary(weight, *metrics, atoms=7, choose=keep(50), steps=steps)
        return metric_norm(weight - codes @ atoms, *metrics)

    errors = [error(steps) for steps in (1, 2, 4, 8)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_values_solve_least_squares_on_their_places():
    metrics = METRICS["full"]()
    weight = draw(14, 10)
    codes, mask, atoms = orthogonal_dictionary(weight, *metrics, atoms=7, choose=keep(50), steps=2, solves=200)
    outputs, inputs = (metric.damped for metric in metrics)
    assert outputs is not None
    assert inputs is not None
    gradient = outputs @ (weight - codes @ atoms) @ inputs @ atoms.mT
    assert float(gradient[mask].abs().max()) < 1e-8 * float(gradient.abs().max())


def test_planted_codes_are_found():
    atoms = torch.linalg.qr(draw(10, 10))[0][:8]
    planted = draw(60, 8, seed=1) * (torch.rand(60, 8, generator=torch.Generator().manual_seed(0)) < 0.25)
    codes, _, found = orthogonal_dictionary(
        planted @ atoms, Metric(), Metric(), atoms=8, choose=keep(int((planted != 0).sum())), steps=60
    )
    assert float((codes @ found - planted @ atoms).norm()) < 0.25 * float(planted.norm())


@pytest.mark.parametrize("atoms", [0, 11])
def test_impossible_sizes(atoms: int):
    with pytest.raises(ValueError, match="cannot have"):
        orthogonal_dictionary(draw(14, 10), Metric(), Metric(), atoms=atoms, choose=keep(1))
