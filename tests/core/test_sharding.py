"""The parts of all devices together are the whole matrix, in values and in what they compute."""

import pytest
import torch
from contracts.examples import EXAMPLES
from structures import STRUCTURES

from rankwise.core.sharding import columns, rows, span
from rankwise.matrices import Dense, LowRank, PivotedLowRank, Product, Quantized, Sparse, StructuredMatrix, Sum

M, N = 48, 32
CASES = {make.__name__: make for make in STRUCTURES} | {
    "dense": lambda m, n: Dense(torch.randn(m, n)),
    "pivoted rows": lambda m, n: pivoted(m, n, 4, "rows"),
    "pivoted columns": lambda m, n: pivoted(m, n, 4, "columns"),
    "product": lambda m, n: Product(LowRank(torch.randn(m, 2), torch.randn(2, 7)), Dense(torch.randn(7, n))),
    "large groups": lambda m, n: quantized(m, n, 24),
    "small groups": lambda m, n: quantized(m, n, 5),
}


def pivoted(m: int, n: int, r: int, side) -> PivotedLowRank:
    lines, length = (m, n) if side == "rows" else (n, m)
    return PivotedLowRank(torch.randn(r, length), torch.randn(lines - r, r), torch.randperm(lines), side)


def quantized(m: int, n: int, group: int) -> Quantized:
    scale, offset = torch.rand(m, -(-n // group)), torch.randn(m, -(-n // group))
    return Quantized.from_codes(torch.randint(8, (m, n)), scale, offset, bits=3, group=group)


def made(case: str, m: int = M, n: int = N) -> StructuredMatrix:
    torch.manual_seed(0)
    return CASES[case](m, n).double()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_rows_stand_below_each_other(case, world):
    matrix, x = made(case), torch.randn(3, N, dtype=torch.float64)
    parts = [rows(matrix, *span(M, M // world, rank, world)) for rank in range(world)]
    torch.testing.assert_close(torch.cat([part.dense() for part in parts]), matrix.dense())
    torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), matrix(x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_outputs_of_columns_add_up(case, world):
    matrix, x = made(case), torch.randn(3, N, dtype=torch.float64)
    spans = [span(N, N // world, rank, world) for rank in range(world)]
    parts = [columns(matrix, *each) for each in spans]
    torch.testing.assert_close(torch.cat([part.dense() for part in parts], 1), matrix.dense())
    sums = torch.stack([part(x[:, a:b]) for part, (a, b) in zip(parts, spans, strict=True)]).sum(0)
    torch.testing.assert_close(sums, matrix(x))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_kind_can_be_cut_anywhere(name):
    matrix = EXAMPLES[name]()
    m, n = matrix.shape
    torch.testing.assert_close(rows(matrix, 1, m - 1).dense().double(), matrix.dense()[1 : m - 1].double())
    torch.testing.assert_close(columns(matrix, 1, n - 1).dense().double(), matrix.dense()[:, 1 : n - 1].double())


def test_parts_keep_the_structure_where_it_is_smaller():
    assert isinstance(rows(made("low_rank"), 0, 24), LowRank)
    assert isinstance(rows(made("low_rank"), 0, 3), Dense)
    assert isinstance(columns(made("low_rank"), 8, 16), LowRank)
    assert isinstance(rows(made("pivoted columns"), 0, 12), PivotedLowRank)
    assert isinstance(rows(made("pivoted rows"), 0, 12), LowRank)
    assert isinstance(columns(made("pivoted rows"), 0, 3), Dense)
    assert isinstance(columns(made("large groups"), 8, 16), Quantized)
    assert isinstance(rows(made("sparse"), 8, 16), Sparse)
    halves = [rows(made("low_bit_and_low_rank"), *span(M, M // 2, rank, 2)) for rank in (0, 1)]
    assert all(isinstance(part, Sum) for part in halves)
    for case in CASES:
        whole = made(case)
        for part in (rows(whole, 0, M // 2), columns(whole, 0, N // 2)):
            assert part.nbytes <= whole.nbytes
            assert {id(t) for t in part.parameters()}.isdisjoint(
                {id(t) for t in whole.parameters()}
            ) or isinstance(part, Product)


def test_uneven_parts_are_refused():
    for whole, part, rank, world in ((8, 3, 0, 2), (8, 2, 4, 4), (8, 16, 0, 2), (8, 0, 0, 2)):
        with pytest.raises(ValueError, match="fewer devices"):
            span(whole, part, rank, world)
