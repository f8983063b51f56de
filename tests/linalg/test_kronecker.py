"""Folded triangles, guarded eigenvectors, and systems with Kronecker products, against dense ones."""

import pytest
import torch
from torch import Tensor

from rankwise.linalg import (
    Jointly,
    KroneckerBasis,
    Separately,
    balanced,
    both,
    eigen,
    fold_symmetric,
    symmetric_eigen,
    unfold_symmetric,
)


def spd(n: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """A random positive semi-definite matrix."""
    rows = torch.randn(rank or 2 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.mT @ rows / len(rows)


def dense(factor: Tensor) -> Tensor:
    return factor.diag() if factor.dim() == 1 else factor


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_folding_keeps_a_symmetric_matrix_in_half_the_numbers(n: int):
    matrix = spd(n)
    folded = fold_symmetric(matrix)
    assert torch.equal(unfold_symmetric(folded, n), matrix)
    even = n + n % 2
    assert folded.numel() == even * (even + 1) // 2
    assert torch.equal(
        unfold_symmetric(fold_symmetric(matrix) + fold_symmetric(spd(n, 1)), n), matrix + spd(n, 1)
    )


KINDS = {"full": (spd(4), spd(6, 1)), "diagonal outputs": (torch.rand(4).double(), spd(6, 1))}
KINDS["diagonal inputs"] = (spd(4), torch.rand(6).double())
KINDS["singular"] = (spd(4, rank=1), spd(6, 1, rank=2))
KINDS["zero"] = (spd(4) * 0, spd(6) * 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [1e-2, 10.0])
def test_jointly_solves_the_dense_system(kind: str, damping: float):
    outputs, inputs = KINDS[kind]
    right = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    system = torch.kron(dense(outputs), dense(inputs)) + damping * torch.eye(24, dtype=torch.float64)
    wanted = torch.linalg.solve(system, right.flatten()).view(4, 6)
    solver = Jointly()
    found = solver.solve(right, solver.prepare(inputs, outputs, 1e9), damping)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [balanced, both])
def test_separately_solves_with_both_factors_damped(kind: str, share):
    outputs, inputs = KINDS[kind]
    right = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, g = share(inputs, outputs, 0.1)
    left, other = dense(outputs) + g * torch.eye(4).double(), dense(inputs) + a * torch.eye(6).double()
    wanted = torch.linalg.solve(torch.kron(left, other), right.flatten()).view(4, 6)
    solver = Separately(share=share)
    found = solver.solve(right, solver.prepare(inputs, outputs, 0.1), 7.0)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-12
    if share is balanced:
        assert a * g == pytest.approx(0.1)
        if kind != "zero":
            assert (a / g) == pytest.approx(float(dense(inputs).trace() / 6 / (dense(outputs).trace() / 4)))
    else:
        assert (a, g) == (0.1, 0.1)


def test_dampings_differ_at_the_same_number():
    outputs, inputs = KINDS["full"]
    right, solvers = torch.ones(4, 6).double(), (Jointly(), Separately(share=both), Separately())
    found = [solver.solve(right, solver.prepare(inputs, outputs, 0.1), 0.1) for solver in solvers]
    jointly, kaisa, factored = (float(each.norm()) for each in found)
    assert jointly > 1.01 * kaisa > 1.01**2 * factored


def test_a_diagonal_is_carried_over_as_that_of_the_operator():
    old, new = (KroneckerBasis.of(eigen(spd(5, s), spd(3, s + 1))) for s in (0, 10))
    values = torch.rand(3, 5).double()
    before, after = (torch.kron(b.left, b.right) for b in (old, new))
    operator = before @ values.flatten().diag() @ before.mT
    torch.testing.assert_close(new.diagonal_from(old, values).flatten(), (after.mT @ operator @ after).diagonal())
    torch.testing.assert_close(old.diagonal_from(old, values), values)


class TestEigen:
    """Decompositions that fail, or are not to be begun."""

    def test_float64_helps_where_float32_fails(self, monkeypatch):
        honest = torch.linalg.eigh

        def fails(matrix: Tensor):
            if matrix.dtype == torch.float32:
                raise torch.linalg.LinAlgError("did not converge")
            return honest(matrix)

        monkeypatch.setattr(torch.linalg, "eigh", fails)
        matrix = spd(5).float()
        values, vectors = symmetric_eigen(matrix)
        assert values.dtype == vectors.dtype == torch.float32
        torch.testing.assert_close(vectors @ values.diag() @ vectors.mT, matrix)

    @pytest.mark.parametrize("silent", [False, True])
    def test_nothing_helps(self, monkeypatch, silent: bool):
        def fails(matrix: Tensor):
            if silent:
                return matrix.diagonal() * float("nan"), matrix * float("nan")
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(torch.linalg, "eigh", fails)
        with pytest.raises(ArithmeticError, match="no eigenvectors of a matrix \\(5, 5\\)"):
            symmetric_eigen(spd(5))

    def test_what_is_not_finite(self):
        with pytest.raises(ValueError, match="not finite"):
            symmetric_eigen(torch.full((2, 2), float("inf")))

    def test_no_eigenvalue_is_negative_and_rounding_in_one_triangle_does_not_matter(self):
        matrix = spd(6, rank=1)
        matrix[0, 5] += 1e-9
        values, vectors = symmetric_eigen(matrix)
        assert float(values.min()) >= 0
        torch.testing.assert_close(vectors @ values.diag() @ vectors.mT, matrix, rtol=0, atol=1e-8)
