"""Largest eigenvalues by products alone, beside LAPACK's."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor

from rankwise.linalg import lanczos


def grams(k: int, n: int, rank: int | None = None) -> Tensor:
    """Symmetric matrices (k, n, n) without negative eigenvalues."""
    factor = draw(k * n, rank or n).view(k, n, -1)
    return factor @ factor.mT


def products(values: Tensor):
    return lambda x: (values @ x[..., None])[..., 0]


def test_they_are_those_of_lapack():
    values = grams(3, 40)
    wanted = torch.linalg.eigvalsh(values).flip(-1)[:, :4]
    found, residuals = lanczos(products(values), draw(3, 40, seed=1), count=4, steps=40, tolerance=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert found.shape == residuals.shape == (3, 4)


def test_residuals_bound_errors_and_it_ends_early():
    values, seen = grams(1, 200), []

    def apply(x: Tensor) -> Tensor:
        seen.append(1)
        return products(values)(x)

    wanted = torch.linalg.eigvalsh(values).flip(-1)[:, :2]
    found, residuals = lanczos(apply, draw(1, 200, seed=1), count=2, steps=200, tolerance=1e-3)
    assert len(seen) < 100
    assert bool(((found - wanted).abs() <= residuals + 1e-9).all())
    assert bool((residuals <= 1e-3 * found[:, :1]).all())
    few, left = lanczos(apply, draw(1, 200, seed=1), count=2, steps=5, tolerance=1e-3)
    assert bool((left > 1e-3 * few[:, :1]).any())  # it says that it is not done


def test_starts_that_are_used_up_are_replaced():
    """The identity, zero and a matrix of rank two, in one call."""
    eye = 3 * torch.eye(12).double()
    values = torch.stack([eye, torch.zeros_like(eye), grams(1, 12, 2)[0]])
    found, residuals = lanczos(products(values), draw(3, 12, seed=2), count=4, steps=12, tolerance=1e-9)
    wanted = torch.linalg.eigvalsh(values).flip(-1)[:, :4]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert float(residuals.max()) < 1e-9


def test_products_that_are_not_finite_raise():
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos(lambda x: x * torch.nan, draw(1, 4), count=1, steps=4, tolerance=0.0)
