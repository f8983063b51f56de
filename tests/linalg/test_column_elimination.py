"""Columns that leave: costs against the closed form, orders against all sets."""

import itertools

import pytest
import torch
from torch import Tensor

from rankwise.linalg import Metric, eliminate_columns, metric_norm, refit_columns


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(n: int, seed: int, rows: int | None = None) -> Tensor:
    x = draw(rows or 3 * n, n, seed=seed) @ (torch.eye(n) + draw(n, n, seed=seed + 100) / n**0.5)
    return x.mT @ x / len(x)


def cost_of(weight: Tensor, outputs: Metric, inputs: Metric, kept: Tensor) -> float:
    """tr(S W (C - C_K C_KK^-1 C_K') W'), with the inverse written out."""
    c = inputs.damped
    assert c is not None
    residual = c - c[:, kept] @ torch.linalg.inv(c[kept][:, kept]) @ c[kept]
    s = torch.eye(len(weight), dtype=torch.float64) if outputs.damped is None else outputs.damped
    return float(torch.trace(s @ weight @ residual @ weight.mT))


def columns(groups: list[int], size: int) -> Tensor:
    return torch.tensor([g * size + i for g in sorted(groups) for i in range(size)])


def others(gone: Tensor, groups: int) -> list[int]:
    return sorted(set(range(groups)) - set(gone.tolist()))


@pytest.mark.parametrize(("k", "size"), [(7, 1), (150, 1), (12, 3), (240, 40)])
@pytest.mark.parametrize("full", [True, False])
def test_costs_are_those_of_the_closed_form(k: int, size: int, full: bool):
    weight = draw(9, k, seed=1)
    outputs = Metric(moment(9, 2)) if full else Metric()
    inputs = Metric(moment(k, 3))
    order, costs = eliminate_columns(weight, outputs, inputs, size=size)
    groups = k // size
    assert len(order) == groups - 1
    assert costs[0] == 0
    for i in {1, groups // 2, groups - 1}:
        kept = columns(others(order[:i], groups), size)
        torch.testing.assert_close(float(costs[i]), cost_of(weight, outputs, inputs, kept), rtol=1e-8, atol=0)
        change = weight.clone()
        change[:, kept] -= refit_columns(weight, inputs, kept)
        torch.testing.assert_close(float(costs[i]), metric_norm(change, outputs, inputs), rtol=1e-8, atol=0)


def test_each_step_is_the_best_of_all_single_ones():
    weight, outputs, inputs = draw(4, 8, seed=1), Metric(moment(4, 2)), Metric(moment(8, 3))
    order, _ = eliminate_columns(weight, outputs, inputs)
    for i in range(len(order)):
        left = others(order[:i], 8)
        costs = {g: cost_of(weight, outputs, inputs, columns([x for x in left if x != g], 1)) for g in left}
        assert min(costs, key=lambda g: costs[g]) == int(order[i])


def test_greedy_sets_are_near_the_best_of_all():
    ratios = []
    for seed in range(20):
        weight, outputs, inputs = (
            draw(4, 10, seed=seed),
            Metric(moment(4, seed + 1)),
            Metric(moment(10, seed + 2)),
        )
        _, costs = eliminate_columns(weight, outputs, inputs, least=5)
        sets = itertools.combinations(range(10), 5)
        best = min(cost_of(weight, outputs, inputs, torch.tensor(kept)) for kept in sets)
        ratios.append(float(costs[-1]) / best)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.5


def test_the_refit_is_least_squares():
    x, weight, kept = draw(60, 6, seed=1), draw(4, 6, seed=2), torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.mT).solution.mT
    torch.testing.assert_close(refit_columns(weight, Metric(x.mT @ x), kept), expected)


def test_dead_doubled_and_dependent_inputs_leave_first_and_cost_nothing():
    x = draw(200, 9, seed=1)
    x[:, 4] = x[:, 2]
    x[:, 7] = 0
    x[:, 1] = x[:, 0] - 2 * x[:, 8]
    weight, inputs = draw(5, 9, seed=2), Metric(x.mT @ x / 200, 1e-13)
    order, costs = eliminate_columns(weight, Metric(), inputs, least=6)
    assert float(costs[-1]) < 1e-10
    kept = torch.tensor(others(order, 9))
    torch.testing.assert_close(
        x[:, kept] @ refit_columns(weight, inputs, kept).mT, x @ weight.mT, rtol=1e-10, atol=1e-10
    )


def test_diagonal_metrics_give_magnitude_pruning():
    weight, scales = draw(3, 6, seed=1), torch.rand(6, generator=torch.Generator().manual_seed(2)).double() + 0.1
    order, costs = eliminate_columns(weight, Metric(), Metric(scales))
    expected = (weight.square().sum(0) * scales).sort()
    assert order.tolist() == expected.indices[:5].tolist()
    torch.testing.assert_close(costs[1:], expected.values[:5].cumsum(0))
    kept = torch.tensor([1, 4])
    torch.testing.assert_close(refit_columns(weight, Metric(scales), kept), weight[:, kept])


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 4}, "size must divide"), ({"least": 0}, "least must")]
)
def test_bad_arguments_are_named(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        eliminate_columns(draw(3, 6, seed=1), Metric(), Metric(), **options)
