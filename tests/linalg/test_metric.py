"""The SVD in two metrics against the formula."""

import pytest
import torch

from rankwise.linalg import Metric, metric_norm, metric_svd, truncated_factors


def spread(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall by ten orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(drawn, full_matrices=False)
    return u * torch.logspace(0, -10, u.shape[1], dtype=torch.float64) @ vt


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_it_is_the_svd_between_the_roots_of_the_metrics(shape: tuple[int, int], rank: int | None):
    m, n = shape
    weight = spread(m, n, 0)
    if rank is not None:
        weight = spread(m, rank, 1) @ spread(rank, n, 2)
    first, second = spread(m, m, 3), spread(n, n, 4)
    outputs, inputs = Metric(first @ first.mT, 1e-3), Metric(second @ second.mT, 1e-3)
    assert outputs.root is not None
    assert inputs.root is not None
    core = outputs.root.mT @ weight @ inputs.root
    wanted = torch.linalg.svdvals(core)
    u, s = metric_svd(weight, outputs, inputs)
    torch.testing.assert_close(s.square(), wanted.square(), rtol=0, atol=4e-15 * float(wanted[0]) ** 2)
    torch.testing.assert_close(u.mT @ u, torch.eye(min(m, n), dtype=u.dtype), rtol=0, atol=1e-13)
    for kept in range(1, min(m, n) + 1):
        left, right = truncated_factors(weight, outputs, u[:, :kept])
        error = metric_norm(weight - left @ right, outputs, inputs)
        best = float(wanted[kept:].square().sum())
        assert abs(error - best) <= 1e-14 * float(wanted.square().sum())
