"""The nearest member of a set in a metric."""

import itertools

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated
from torch import Tensor

from rankwise.linalg import Metric, Splitting, largest, metric_norm

WEIGHTS = (0.05, 5.0)


def moment(n: int, seed: int) -> Tensor:
    rows = correlated(300, n, seed)
    return rows.mT @ rows / len(rows)


METRICS = {
    "identity": lambda m, n: (Metric(), Metric()),
    "diagonal": lambda m, n: (Metric(moment(m, 1).diagonal()), Metric(moment(n, 2).diagonal())),
    "full": lambda m, n: (Metric(moment(m, 1), 0.05), Metric(moment(n, 2), 0.05)),
}


@pytest.fixture(params=METRICS)
def splitting(request: pytest.FixtureRequest) -> Splitting:
    return Splitting(draw(14, 10), *METRICS[request.param](14, 10))


def least_squares(splitting: Splitting, mask: Tensor) -> Tensor:
    """The best values in a mask, from the normal equations of all entries."""
    curvature = torch.kron(splitting.outputs, splitting.inputs)
    inside = mask.flatten().bool()
    right = (curvature @ splitting.target.flatten())[inside]
    z = torch.zeros_like(splitting.target).flatten()
    z[inside] = torch.linalg.solve(curvature[inside][:, inside], right)
    return z.view_as(mask)


@pytest.mark.parametrize("name", METRICS)
def test_the_error_is_the_metric_s(name: str):
    weight, metrics = draw(14, 10), METRICS[name](14, 10)
    splitting, other = Splitting(weight, *metrics), draw(14, 10, seed=1)
    torch.testing.assert_close(splitting.plain(splitting.target), weight)
    assert splitting.error(splitting.scaled(other)) == pytest.approx(metric_norm(weight - other, *metrics))


def test_refitted_values_are_the_best_ones(splitting: Splitting):
    mask = draw(14, 10, seed=3) > 0
    found = splitting.refit(mask, splitting.target, 200)
    torch.testing.assert_close(found, least_squares(splitting, mask), rtol=1e-6, atol=1e-9)
    assert not bool(found[~mask].any())


def test_the_nearest_in_a_subspace_is_found(splitting: Splitting):
    mask = (draw(14, 10, seed=3) > 0).double()
    found = splitting.nearest(lambda x: x * mask, 400, (0.1, 0.1), splitting.target) * mask
    torch.testing.assert_close(found, least_squares(splitting, mask), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["identity", "diagonal"])
def test_without_correlations_the_largest_entries_are_the_best(name: str):
    splitting = Splitting(draw(14, 10), *METRICS[name](14, 10))
    start = splitting.nearest(lambda x: x * largest(x.abs(), 40), 8, (5.0, 50.0), splitting.target)
    assert torch.equal(largest(start.abs(), 40), largest(splitting.target.abs(), 40))


@pytest.mark.parametrize("seed", range(6))
def test_supports_are_near_the_best_of_all(seed: int):
    metrics = Metric(moment(3, seed), 0.05), Metric(moment(3, seed + 10), 0.05)
    splitting = Splitting(draw(3, 3, seed=seed), *metrics)

    def error(places: tuple[int, ...]) -> float:
        mask = torch.zeros(9, dtype=torch.float64)
        mask[list(places)] = 1
        return splitting.error(least_squares(splitting, mask.view(3, 3)))

    errors = sorted(error(places) for places in itertools.combinations(range(9), 5))
    start = splitting.nearest(lambda x: x * largest(x.abs(), 5), 20, WEIGHTS, splitting.target)
    found = error(tuple(largest(start.abs(), 5).flatten().nonzero()[:, 0].tolist()))
    assert found <= errors[len(errors) // 20]  # among the best 6 of 126
