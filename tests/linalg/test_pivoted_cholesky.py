"""Rows that a pivoted Cholesky chooses are those of a pivoted QR, and what they leave is the Schur complement."""

import pytest
import scipy.linalg
import torch
from torch import Generator, Tensor

from rankwise.linalg import pivoted_cholesky


def columns(n: int = 12, d: int = 30, decay: float = 0.6, seed: int = 0) -> Tensor:
    """(d, n), with singular values that fall."""
    rng = Generator().manual_seed(seed)
    u = torch.randn(d, n, dtype=torch.float64, generator=rng)
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    return left * decay ** torch.arange(n, dtype=torch.float64) @ right


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_it_is_the_column_pivoted_qr_of_u(rank: int):
    u = columns()
    _, upper, pivots = scipy.linalg.qr(u.numpy(), mode="economic", pivoting=True)
    found = pivoted_cholesky(u.mT @ u, rank)
    assert found.rows.tolist() == pivots[:rank].tolist()
    wanted = torch.tensor(scipy.linalg.solve_triangular(upper[:rank, :rank], upper[:rank]))
    torch.testing.assert_close(found.mix[:, torch.tensor(pivots.tolist())], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_residual_is_that_of_the_projection(rank: int):
    u = columns()
    found = pivoted_cholesky(u.mT @ u, rank)
    kept = u[:, found.rows]
    torch.testing.assert_close(kept @ found.mix, kept @ torch.linalg.lstsq(kept, u).solution)
    rest = u - kept @ found.mix
    torch.testing.assert_close(found.residual, rest.mT @ rest, rtol=1e-10, atol=1e-13)
    assert float(torch.linalg.eigvalsh(found.residual).min()) > -1e-14
    assert not found.residual[found.rows].any()
    assert not found.residual[:, found.rows].any()
    assert torch.equal(found.mix[:, found.rows], torch.eye(rank, dtype=u.dtype))
    assert sorted([*found.rows.tolist(), *found.others.tolist()]) == [*range(12)]


def test_the_residual_is_between_the_best_one_and_the_known_bound():
    """The trace of E is at least the tail of the eigenvalues, and at most (n - r) 4^r times the next one."""
    u = columns(decay=0.3)
    values = torch.linalg.eigvalsh(u.mT @ u).flip(0)
    traces = []
    for rank in range(12):
        traces.append(float(pivoted_cholesky(u.mT @ u, rank).residual.trace()))
        assert traces[-1] >= float(values[rank:].sum()) - 1e-14
        assert traces[-1] <= (12 - rank) * 4**rank * float(values[rank]) + 1e-14
    assert traces == sorted(traces, reverse=True)
    assert traces[0] == pytest.approx(float(values.sum()))


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("rank", [0, 3, 12])
def test_what_is_left_out_counts_as_damping(rank: int, damping: float):
    u = columns()
    found = pivoted_cholesky(u.mT @ u, rank)
    wanted = found.mix @ torch.linalg.inv(torch.eye(12, dtype=u.dtype) + found.residual / damping) @ found.mix.mT
    lower = found.damped(damping)
    torch.testing.assert_close(lower @ lower.mT, wanted, rtol=1e-9, atol=1e-10)
    assert torch.equal(lower, lower.tril())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_and_zeros_are_not_chosen(dtype: torch.dtype):
    u = columns(4)[:, [0, 1, 0, 2, 2, 3, 0]].to(dtype)
    u[:, 5] = 0
    found = pivoted_cholesky(u.mT @ u, 7)
    assert len(found.rows) == 3
    assert {min(row, {2: 0, 6: 0, 4: 3}.get(row, row)) for row in found.rows.tolist()} == {0, 1, 3}
    torch.testing.assert_close(u[:, found.rows] @ found.mix, u, rtol=1e-4, atol=10 * torch.finfo(dtype).eps)


def test_a_tolerance_stops_early():
    u = columns(decay=0.1)
    assert len(pivoted_cholesky(u.mT @ u, 12, tolerance=1e-3).rows) < 4


@pytest.mark.parametrize("n", [0, 3])
def test_a_kernel_of_nothing_has_no_rows(n: int):
    found = pivoted_cholesky(torch.zeros(n, n), 2)
    assert found.rows.shape == (0,)
    assert found.mix.shape == (0, n)
    assert found.others.tolist() == [*range(n)]


def test_a_negative_rank_is_refused():
    with pytest.raises(ValueError, match="rank must be >= 0"):
        pivoted_cholesky(torch.eye(2), -1)
