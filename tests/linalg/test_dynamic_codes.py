"""Dynamic codes hold what they promise, for numbers of all sizes."""

from itertools import pairwise

import pytest
import torch
from contracts.examples import draw
from torch import Tensor

from rankwise.linalg import decode, dynamic_table, encode

BLOCK = 16


def there_and_back(values: Tensor, bits: int = 8, block: int = BLOCK) -> Tensor:
    return decode(*encode(values, bits, block), values.shape[-1], bits, block)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_table_is_what_the_bits_of_codes_say(bits: int, signed: bool):
    """The published type, bit by bit: zeros count decades, a one ends them, and what is left is a fraction.

    With signs the first bit is the sign. Without, the published table has twice as many fractions instead.
    The two codes with nothing but zeros after the sign stand for 0 and 1.
    """
    wanted = {0.0, 1.0}
    for code in range(1, 2 ** (bits - 1)):
        fraction_bits = code.bit_length() - 1
        parts = 2 ** (fraction_bits + (not signed))
        first = (code - 2**fraction_bits) * (1 if signed else 2)
        for part in range(first, first + (1 if signed else 2)):
            wanted.add((0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** -(bits - 2 - fraction_bits))
    if signed:
        below = sorted(-value for value in wanted if 0 < value < 1)
        wanted |= {-1.0, *below[1:]}  # the lowest is -1 instead
    assert len(wanted) == 2**bits
    assert dynamic_table(bits, signed=signed) == pytest.approx(sorted(wanted), rel=1e-12, abs=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_no_value_is_nearer_than_the_one_that_is_taken(bits: int, signed: bool):
    """Against all values of the table, in float64, for numbers of all sizes."""
    values = draw(3, 1000) * 10 ** (4 * draw(3, 1000, seed=1))
    values = (values if signed else values.abs()).float()
    found = there_and_back(values, bits).double()
    table = torch.tensor(dynamic_table(bits, signed=signed), dtype=torch.float64)
    padded = torch.nn.functional.pad(values, (0, -1000 % BLOCK)).double().view(3, -1, BLOCK)
    largest = padded.abs().amax(-1, keepdim=True)
    if signed:
        assert bool((padded < 0).any(-1).all())
    else:
        table = table[1:]  # zero is for zeros alone
    error = (padded[..., None] - largest[..., None] * table).abs().amin(-1)
    error = torch.where(padded == 0, 0.0, error).flatten(1)[:, :1000]
    largest = largest.expand_as(padded).flatten(1)[:, :1000]
    assert bool(((found - values.double()).abs() <= error + 1e-6 * largest).all())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_change_in_the_middle_between_values(bits: int, signed: bool):
    """Just below, at and just above all places where the nearest value changes, in one block with a 1."""
    table = torch.tensor(dynamic_table(bits, signed=signed), dtype=torch.float64)
    middles = ((table[1:] + table[:-1]) / 2).float()
    up, down = (torch.nextafter(middles, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    values = torch.cat([torch.tensor([1.0]), up, middles, down])[None]
    found = there_and_back(values, bits, values.shape[1])[0, 1:].view(3, -1)
    if not signed:
        assert bool((found > 0).all())
        found, table = found[:, 1:], table[1:]  # what is above zero stays above zero
    torch.testing.assert_close(found[0].double(), table[1:], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2].double(), table[:-1], rtol=1e-6, atol=0)
    assert bool(((found[1] == found[0]) | (found[1] == found[2])).all())


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.011), (4, 0.17)])
def test_errors_have_a_bound_and_signs_stay(bits: int, bound: float):
    """Half the widest gap of the table, of the largest number of the block."""
    values = draw(4, 5 * BLOCK).float()
    found = there_and_back(values, bits)
    largest = values.view(4, -1, BLOCK).abs().amax(-1, keepdim=True).expand(4, -1, BLOCK).flatten(1)
    table = dynamic_table(bits, signed=True)
    widest = max(b - a for a, b in pairwise(table)) / 2
    assert widest < bound
    assert bool(((found - values).abs() <= widest * largest * (1 + 1e-6)).all())
    assert bool((found * values >= 0).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_largest_numbers_and_zeros_are_exact_and_writing_again_changes_nothing(bits: int):
    values = draw(2, 5 * BLOCK + 3).float()
    values[0, :BLOCK], values[0, BLOCK : 2 * BLOCK], values[1, ::3] = 0.0, -3.7, 0.0
    found = there_and_back(values, bits)
    assert torch.equal(found[values == 0], values[values == 0])
    assert torch.equal(found[0, : 2 * BLOCK], values[0, : 2 * BLOCK])
    for block, kept in zip(values.split(BLOCK, dim=1), found.split(BLOCK, dim=1), strict=True):
        torch.testing.assert_close(kept.abs().amax(-1), block.abs().amax(-1), rtol=1e-7, atol=0)
    again = found
    for _ in range(3):
        again = there_and_back(again, bits)
    assert torch.equal(again, found)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_above_zero_stays_above_zero_beside_any_other(bits: int):
    values = torch.logspace(0, -30, BLOCK)[None]
    assert bool((there_and_back(values, bits) > 0).all())
    mixed = torch.cat([values, -values], dim=1)  # with signs small ones may vanish
    assert not bool((there_and_back(mixed, bits, 2 * BLOCK) != 0).all())


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 16), (2, 33), (0, 5)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_sizes_need_not_fit(shape: tuple[int, int], bits: int):
    values = draw(*shape).float()
    codes, scales = encode(values, bits, BLOCK)
    assert codes.shape == (shape[0], -(-shape[1] // 8) * bits)
    assert scales.shape == (shape[0], -(-shape[1] // BLOCK))
    assert there_and_back(values, bits).shape == shape
    blank = encode(values.to("meta"), bits, BLOCK)
    assert [(b.shape, b.dtype) for b in blank] == [(codes.shape, codes.dtype), (scales.shape, scales.dtype)]
