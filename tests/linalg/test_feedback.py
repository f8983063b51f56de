"""Feedback alignment finds what the randomised range finder finds: the optimum at full rank, less below."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor

from rankwise.linalg import feedback_factors, feedback_range, gradient_factors, orthonormal

ROWS, COLUMNS = 12, 10


def matrix(rank: int, seed: int = 0) -> Tensor:
    """Y with singular values 1, 0.7, 0.5, ..."""
    left, right = orthonormal(draw(ROWS, rank, seed=seed)), orthonormal(draw(COLUMNS, rank, seed=seed + 1))
    return left * 0.7 ** torch.arange(rank, dtype=torch.float64) @ right.mT


def start(rank: int) -> tuple[Tensor, Tensor]:
    return 1e-3 * draw(ROWS, rank, seed=5), 1e-3 * draw(rank, COLUMNS, seed=6)


def sketch(rank: int, seed: int = 7) -> Tensor:
    return draw(COLUMNS, rank, seed=seed) / COLUMNS**0.5


def projector(columns: Tensor) -> Tensor:
    basis = orthonormal(columns)
    return basis @ basis.mT


def error(y: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    return float((y - factors[0] @ factors[1]).norm() / y.norm())


def range_error(y: Tensor, feedback: Tensor) -> float:
    return float((y - projector(y @ feedback) @ y).norm() / y.norm())


def svd_error(y: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(y)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 5])
def test_with_the_rank_of_the_matrix_all_reach_the_optimum(rank: int):
    y = matrix(3)
    assert error(y, gradient_factors(y, start(rank), steps=4000)) < 1e-4
    assert error(y, feedback_factors(y, start(rank), sketch(rank), steps=4000)) < 1e-4
    assert error(y, feedback_range(y, start(rank)[0], sketch(rank), steps=300)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 8, 9])
def test_below_it_the_limit_is_that_of_the_range_finder(seed: int):
    y, rank = matrix(10), 3
    c = sketch(rank, seed)
    found = error(y, feedback_factors(y, start(rank), c, steps=12000))
    assert found == pytest.approx(range_error(y, c), abs=1e-4)
    assert error(y, feedback_range(y, start(rank)[0], c, steps=300)) == pytest.approx(range_error(y, c), abs=1e-4)
    assert found > svd_error(y, rank) + 0.01


def test_gradient_descent_reaches_the_error_of_the_truncated_svd():
    y = matrix(10)
    assert error(y, gradient_factors(y, start(3), steps=6000)) == pytest.approx(svd_error(y, 3), abs=1e-4)


def test_the_right_feedback_reaches_it_too():
    y, rank = matrix(10), 3
    best = torch.linalg.svd(y)[2][:rank].mT
    assert error(y, feedback_factors(y, start(rank), best, steps=6000)) == pytest.approx(
        svd_error(y, rank), abs=1e-4
    )


@pytest.mark.slow
def test_at_the_limit_nothing_is_fed_back():
    y, c = matrix(10), sketch(3)
    z, w = feedback_factors(y, start(3), c, steps=12000)
    assert float(((y - z @ w) @ c).norm()) < 1e-4
    z, w = feedback_range(y, start(3)[0], c, steps=600)
    assert float(((y - z @ w) @ c).norm()) < 1e-10


def test_a_refresh_of_the_feedback_is_a_power_iteration():
    y, c = matrix(10), sketch(3)
    _, w = feedback_range(y, start(3)[0], c, steps=600)
    again, _ = feedback_range(y, start(3)[0], w.mT, steps=3000)
    torch.testing.assert_close(projector(again), projector(y @ y.mT @ y @ c), rtol=0, atol=1e-6)
    assert range_error(y, w.mT) < range_error(y, c)


def test_the_best_factor_lets_the_other_only_grow():
    y, c, z = matrix(10), sketch(3), start(3)[0]
    norms = []
    for _ in range(5):
        norms.append(float(z.norm()))
        z, w = feedback_range(y, z, c, steps=1)
        assert float((z.mT @ (y - z @ w)).norm()) < 1e-12
    assert norms == sorted(norms)


def test_weights_align_with_the_feedback():
    y, c = matrix(10), sketch(3)

    def cosine(steps: int) -> float:
        w = feedback_factors(y, start(3), c, steps=steps)[1]
        return float((w.mT * c).sum() / (w.norm() * c.norm()))

    cosines = [cosine(steps) for steps in (1, 30, 60, 90)]
    assert abs(cosines[0]) < 0.2
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.3


def test_feedback_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="feedback must be"):
        feedback_factors(matrix(3), start(3), sketch(3).mT, steps=1)
