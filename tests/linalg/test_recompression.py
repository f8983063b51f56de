"""Recompression against the dense best approximation, in float64."""

import pytest
import torch
from contracts.examples import draw

from rankwise.linalg import Metric, metric_norm, metric_svd, recompressed, truncated_factors


def gram(size: int, seed: int) -> torch.Tensor:
    rows = draw(3 * size, size, seed=seed)
    return rows.mT @ rows / len(rows)


METRICS = {
    "entries": lambda: (Metric(), Metric()),
    "diagonal": lambda: (Metric(draw(11, seed=7).square() + 0.1), Metric(draw(8, seed=8).square() + 0.1)),
    "inputs": lambda: (Metric(), Metric(gram(8, 8), 1e-6)),
    "both": lambda: (Metric(gram(11, 7), 0.05), Metric(gram(8, 8), 1e-6)),
}


@pytest.mark.parametrize("metrics", METRICS)
@pytest.mark.parametrize(("columns", "rank"), [(5, 3), (1, 1), (8, 6), (10, 8)])  # more columns than n, too
def test_it_is_the_best_matrix_of_the_rank(metrics: str, columns: int, rank: int):
    left, right = draw(11, columns), draw(columns, 8, seed=1)
    dense, (outputs, inputs) = left @ right, METRICS[metrics]()
    one, other, values = recompressed(left, right, rank, outputs, inputs)
    u, s = metric_svd(dense, outputs, inputs)
    best = torch.mm(*truncated_factors(dense, outputs, u[:, :rank]))
    assert (one.shape, other.shape) == ((11, rank), (rank, 8))
    torch.testing.assert_close(one @ other, best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values[: len(s)], s[: len(values)], rtol=1e-9, atol=1e-9)
    missing = metric_norm(dense - one @ other, outputs, inputs)
    assert missing == pytest.approx(float(s[rank:].square().sum()), rel=1e-9, abs=1e-18)
