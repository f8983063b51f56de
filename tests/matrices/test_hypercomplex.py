"""Sums of Kronecker products: their special cases, and the products that they are named for."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise.matrices import Hypercomplex, LowRank, from_spec


def random(k: int, m: int, n: int, rank: int = 1) -> Hypercomplex:
    return Hypercomplex(draw(k, k, k), draw(k, m // k, rank, seed=1), draw(k, rank, n // k, seed=2))


@pytest.mark.parametrize(("k", "m", "n", "rank"), [(1, 5, 3, 2), (2, 6, 8, 1), (4, 8, 12, 3), (3, 3, 9, 1)])
def test_it_is_the_sum_of_torch_kron(k: int, m: int, n: int, rank: int):
    matrix = random(k, m, n, rank)
    blocks = [left @ right for left, right in zip(matrix.left, matrix.right, strict=True)]
    expected = sum(torch.kron(a, b) for a, b in zip(matrix.mixers, blocks, strict=True))
    x, y = draw(2, 3, n, seed=3), draw(2, 3, m, seed=4)
    torch.testing.assert_close(matrix.dense(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix(x), x @ expected.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.adjoint(y), y @ expected, rtol=0, atol=1e-12)


def test_one_term_is_a_multiple_of_a_low_rank_matrix():
    matrix = random(1, 6, 4, 2)
    low = LowRank(matrix.left[0].detach(), matrix.right[0].detach())
    torch.testing.assert_close(matrix.dense(), matrix.mixers[0, 0, 0] * low.dense())


def test_mixers_with_one_entry_on_the_diagonal_make_it_block_diagonal():
    matrix = random(3, 6, 9)
    matrix.mixers.data = torch.stack([torch.eye(3)[i].diag() for i in range(3)]).double()
    blocks = [left @ right for left, right in zip(matrix.left, matrix.right, strict=True)]
    torch.testing.assert_close(matrix.dense(), torch.block_diag(*blocks))


def hamilton(p: Tensor, q: Tensor) -> Tensor:
    """The product of two quaternions, from the table of Hamilton."""
    a, b, c, d = p
    e, f, g, h = q
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ]
    )


def test_four_terms_with_hamiltons_matrices_multiply_quaternions():
    one = torch.eye(4, dtype=torch.float64)
    mixers = torch.stack([torch.stack([hamilton(unit, q) for q in one], dim=1) for unit in one])
    p, q = draw(4), draw(4, seed=1)
    matrix = Hypercomplex(mixers, p.view(4, 1, 1), torch.ones(4, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(matrix(q), hamilton(p, q))


def test_its_rank_is_at_most_that_of_its_parts():
    matrix = random(2, 32, 40)
    assert matrix.rank == 4
    assert int(torch.linalg.matrix_rank(matrix.dense())) == 4


def test_mixers_are_shared_and_get_the_gradients_of_all():
    shared = nn.Parameter(draw(2, 2, 2))
    made = [Hypercomplex(shared, draw(2, 3, 1, seed=i), draw(2, 1, 2, seed=i + 1)) for i in (1, 5)]
    assert all(matrix.mixers is shared for matrix in made)
    x = draw(3, 4, seed=9)
    alone = [torch.autograd.grad(matrix(x).square().sum(), shared)[0] for matrix in made]
    sum(matrix(x).square().sum() for matrix in made).backward()
    torch.testing.assert_close(shared.grad, alone[0] + alone[1])


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="disagree"):
        Hypercomplex(draw(2, 2, 3), draw(2, 3, 1), draw(2, 1, 2))
    with pytest.raises(ValueError, match="disagree"):
        Hypercomplex(draw(2, 2, 2), draw(2, 3, 1), draw(2, 2, 2))
    with pytest.raises(ValueError, match="must divide"):
        from_spec({"kind": "Hypercomplex", "shape": [6, 5], "count": 2, "block_rank": 1})
