"""Matrices whose numbers are packed into bytes."""

import pytest
import torch
from contracts.examples import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, nn

from rankwise.core.surgery import StructuredLinear
from rankwise.linalg import pack, packed_bytes, unpack
from rankwise.matrices import LowRank, Quantized, Scaled, SemiSparse, Sparse, Sum, from_spec
from rankwise.models import sizes


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_packing_is_lossless_and_dense(bits: int, m: int, n: int, seed: int):
    codes = torch.randint(0, 2**bits, (m, n), generator=Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (m, packed_bytes(n, bits))
    assert packed_bytes(n, bits) == -(-n // 8) * bits
    assert torch.equal(unpack(packed, bits)[:, :n].long(), codes)
    assert not bool(unpack(packed, bits)[:, n:].any())


def test_codes_out_of_range():
    with pytest.raises(ValueError, match=r"0 \.\.\. 7"):
        pack(torch.tensor([[8]]), 3)
    with pytest.raises(ValueError, match=r"0 \.\.\. 7"):
        pack(torch.tensor([[-1]]), 3)


@pytest.mark.parametrize("group", [1, 3, 8, 10, 64])
def test_quantized_is_scale_times_code_plus_offset(group: int):
    codes, groups = torch.arange(30).view(3, 10) % 16, -(-10 // group)
    scale, offset = draw(3, groups), draw(3, groups, seed=1)
    matrix = Quantized.from_codes(codes, scale, offset, bits=4, group=group)
    wide = [t.repeat_interleave(group, 1)[:, :10] for t in (scale, offset)]
    torch.testing.assert_close(matrix.dense().detach(), wide[0] * codes + wide[1], rtol=0, atol=1e-14)
    floats, byte_count = Quantized.stored(3, 10, 4, group)
    assert matrix.nbytes == floats * 8 + byte_count == 2 * 3 * groups * 8 + 3 * 8
    assert matrix.params == 30 + floats


def test_sparse_counts_its_bitmap_by_sixteenths():
    mask = draw(6, 20) > 0.5
    matrix = Sparse.from_dense(draw(6, 20, seed=1), mask)
    assert torch.equal(matrix.mask(), mask)
    assert matrix.params == int(mask.sum()) + 9  # 6 rows of 3 bytes
    floats, byte_count = Sparse.stored(6, 20, mask.sum())
    assert matrix.nbytes == int(floats) * 8 + int(byte_count) == int(mask.sum()) * 8 + 18


@pytest.mark.parametrize(("kept", "group", "bits"), [(2, 4, 2), (1, 2, 1), (4, 8, 3), (1, 16, 4)])
def test_semi_sparse_counts_its_places_by_bits(kept: int, group: int, bits: int):
    weight = draw(6, 128)
    matrix = SemiSparse.from_dense(weight, kept=kept, group=group)
    matrix.check()
    largest = weight.view(6, -1, group).abs().sort(dim=2, descending=True).values[:, :, :kept].sum()
    assert float(matrix.dense().detach().abs().sum()) == pytest.approx(float(largest))
    values = 6 * 128 * kept // group
    assert matrix.params == values + -(-values * bits // 16)
    assert matrix.nbytes == values * 8 + values * bits // 8
    assert SemiSparse.stored(6, 128, kept, group) == (values, values * bits // 8)


def test_sizes_of_a_model_count_packed_numbers():
    codes = torch.zeros(8, 16, dtype=torch.int64)
    low_bit = Quantized.from_codes(codes, torch.ones(8, 2), torch.ones(8, 2), bits=4, group=8)
    matrix = Sum(Scaled(low_bit, 2.0), LowRank(torch.ones(8, 1), torch.ones(1, 16)))
    model = nn.Sequential(StructuredLinear(matrix, None), nn.Linear(8, 2, bias=False))
    assert sizes(model) == {"params": 128 + 32 + 24 + 16, "bytes": 64 + 4 * (32 + 24 + 16), "macs_per_token": 176}


def test_damaged_numbers():
    matrix = Sparse.from_dense(torch.eye(3))
    matrix.check()
    matrix.bitmap[0, 0] = 0b1000_0001  # a mark behind the last column
    with pytest.raises(ValueError, match="damaged"):
        matrix.check()
    with pytest.raises(ValueError, match="bitmap"):
        Sparse(torch.ones(3), torch.zeros(3, 2, dtype=torch.uint8), 3)
    semi = SemiSparse.from_dense(torch.eye(4), kept=2, group=4)
    semi.places[0, 0] = 0  # the same place twice
    with pytest.raises(ValueError, match="damaged"):
        semi.check()
    with pytest.raises(ValueError, match="2 of every 4"):
        SemiSparse.from_dense(torch.eye(4), torch.eye(4).bool(), kept=2, group=4)
    with pytest.raises(ValueError, match="uint8"):
        SemiSparse(torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.uint8), kept=2, group=4)
    with pytest.raises(TypeError, match="values"):
        Sparse(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="4-bit codes"):
        Quantized(
            torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1), columns=8, bits=4, group=8
        )
    with pytest.raises(ValueError, match="bits must be"):
        Quantized(
            torch.zeros(2, 9, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1), columns=8, bits=9, group=8
        )


@pytest.mark.parametrize("kept", [1, 11, 12, 37, 55])
def test_an_empty_sparse_matrix_is_made_on_any_device(kept):
    spec = {"kind": "Sparse", "shape": [5, 11], "kept": kept}
    made = from_spec(spec)
    made.check()
    assert torch.equal(made.mask().flatten(), torch.arange(55) < kept)
    with torch.device("meta"):  # as transformers does while it loads
        assert from_spec(spec).bitmap.is_meta
