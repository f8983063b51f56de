"""Small integers, several to a byte, and numbers at the bits of a bitmap."""

import pytest
import torch

from rankwise.linalg import pack, packed_bytes, spread, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 16), (2, 13), (1, 1), (0, 8)])
def test_unpacked_codes_are_those_packed(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (shape[0], packed_bytes(shape[1], bits))
    unpacked = unpack(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert unpacked.shape == (shape[0], -(-shape[1] // 8) * 8)
    assert torch.equal(unpacked[:, : shape[1]].long(), codes)
    assert not unpacked[:, shape[1] :].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_numbers_stand_where_the_bits_are(dtype, density):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 21, generator=generator) < density
    mask[-2:] = False  # the last bytes point behind the last number
    values = torch.randn(int(mask.sum()), generator=generator).to(dtype)
    values[:2] = torch.tensor([float("inf"), float("nan")])[: len(values)].to(dtype)
    expected = torch.zeros(7, 21, dtype=dtype).masked_scatter(mask, values)
    torch.testing.assert_close(spread(values, pack(mask, 1))[:, :21], expected, rtol=0, atol=0, equal_nan=True)
