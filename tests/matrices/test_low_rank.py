"""The pivot gauge: a rank-r matrix in exactly as many numbers as it has degrees of freedom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from rankwise.linalg import interpolative_rows
from rankwise.matrices import LowRank, PivotedLowRank


def decaying(m: int, n: int, r: int, condition: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors of a matrix whose singular values fall from 1 to 1 / condition, in float64."""
    generator = Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0].mT
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), r, dtype=torch.float64)
    return left * values, right


SHAPES = [(40, 40, 17), (60, 20, 20), (20, 60, 20), (50, 30, 1), (30, 50, 29), (7, 1, 1), (1, 7, 1)]


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_equals_low_rank_in_float32(m: int, n: int, r: int, condition: float):
    left, right = decaying(m, n, r, condition)
    factors, pivoted = (kind.from_factors(left.float(), right.float()) for kind in (LowRank, PivotedLowRank))
    norm = float((left @ right).norm())
    torch.testing.assert_close(pivoted.dense(), factors.dense(), rtol=0, atol=1e-5 * norm)
    assert bool((pivoted.mix.abs() <= 1.1 + 1e-6).all())
    x = torch.randn(5, n, generator=Generator().manual_seed(1))
    torch.testing.assert_close(pivoted(x), factors(x), rtol=0, atol=1e-5 * norm * float(x.norm()))
    y = torch.randn(5, m, generator=Generator().manual_seed(2))
    torch.testing.assert_close(pivoted.adjoint(y), factors.adjoint(y), rtol=0, atol=1e-5 * norm * float(y.norm()))


def test_the_shorter_side_is_pivoted():
    assert [PivotedLowRank.from_factors(*decaying(m, 5, 2, 2.0)).side for m in (4, 5, 6)] == [
        "rows",
        "columns",
        "columns",
    ]


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_stores_the_degrees_of_freedom(m: int, n: int, r: int):
    matrix = PivotedLowRank.from_factors(*decaying(m, n, r, 10.0))
    numbers = sum(p.numel() for p in matrix.parameters())
    assert numbers == matrix.macs == r * (m + n - r)
    assert matrix.macs < LowRank.from_factors(*decaying(m, n, r, 10.0)).macs
    assert matrix.order.dtype == torch.int32
    assert matrix.params == numbers + min(m, n)
    for kind in (LowRank, PivotedLowRank):
        floats, indices = kind.stored(m, n, torch.tensor([r]))
        assert int(floats + indices) == kind.from_factors(*decaying(m, n, r, 10.0)).params


@pytest.mark.parametrize("kind", [LowRank, PivotedLowRank])
def test_rank_deficient_factors(kind: type[LowRank] | type[PivotedLowRank]):
    left, right = decaying(12, 9, 6, 10.0)
    left[:, 3:] = 0
    matrix = kind.from_factors(left, right)
    torch.testing.assert_close(matrix.dense(), left @ right, rtol=0, atol=1e-12)
    left[:, 3:] = left[:, :3]
    torch.testing.assert_close(kind.from_factors(left, right).dense(), left @ right, rtol=0, atol=1e-12)
    zero = kind.from_factors(torch.zeros(12, 6), torch.zeros(6, 9))
    assert torch.equal(zero.dense(), torch.zeros(12, 9))


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6), st.floats(0, 10), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_matrix_of_rank_r(m: int, n: int, seed: int, decades: float, data: st.DataObject):
    r = data.draw(st.integers(1, min(m, n)))
    left, right = decaying(m, n, r, 10**decades, seed)
    matrix = PivotedLowRank.from_factors(left, right)
    torch.testing.assert_close(matrix.dense(), left @ right, rtol=0, atol=1e-12)
    assert sorted(matrix.order.tolist()) == list(range(min(m, n)))
    assert bool((matrix.mix.abs() <= 1.1 + 1e-12).all())


@given(st.integers(2, 12), st.integers(0, 10**6), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_rows_of_small_integers(m: int, seed: int, data: st.DataObject):
    """Ties, repeated rows and deficient ranks."""
    r = data.draw(st.integers(1, m))
    tall = torch.randint(-1, 2, (m, r), generator=Generator().manual_seed(seed)).double()
    kept, others, mix = interpolative_rows(tall)
    assert sorted([*kept.tolist(), *others.tolist()]) == list(range(m))
    torch.testing.assert_close(mix @ tall[kept], tall[others], rtol=0, atol=1e-12)


def test_same_input_same_bits():
    left, right = decaying(30, 20, 9, 1e3)
    first, second = (PivotedLowRank.from_factors(left, right).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_bad_arguments():
    with pytest.raises(ValueError, match="disagree"):
        LowRank(torch.ones(3, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="disagree"):
        PivotedLowRank(torch.ones(2, 3), torch.ones(1, 1), torch.arange(3))
    with pytest.raises(ValueError, match="order"):
        PivotedLowRank(torch.ones(1, 3), torch.ones(1, 1), torch.arange(3))
    with pytest.raises(ValueError, match="side"):
        PivotedLowRank(torch.ones(1, 3), torch.ones(1, 1), torch.arange(2), "both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="left"):
        LowRank(torch.ones(3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="rows"):
        interpolative_rows(torch.ones(2, 3))
    with pytest.raises(ValueError, match="bound"):
        interpolative_rows(torch.ones(3, 2), bound=1.0)
