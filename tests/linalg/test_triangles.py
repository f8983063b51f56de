"""Products with triangular matrices against the whole matrix."""

import pytest
import torch
from contracts.examples import draw

from rankwise.linalg.triangles import SMALL, transposed_product


@pytest.mark.parametrize("n", [1, SMALL, SMALL + 1, 2 * SMALL + 3])
@pytest.mark.parametrize("k", [0, 1, 7])
def test_a_product_without_the_zeros_is_the_product(n: int, k: int):
    lower, x = draw(n, n).tril(), draw(n, k, seed=1)
    torch.testing.assert_close(transposed_product(lower, x), lower.mT @ x, rtol=1e-12, atol=1e-11)
