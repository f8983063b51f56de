"""Numbers of very different sizes in 2 to 8 bits: dynamic codes, with a scale for each block of neighbours."""

import functools

import torch
from torch import Tensor

from .packing import pack_fitting, unpack

SHORT = 2**16  # values of 16 bits


def dynamic_table(bits: int, *, signed: bool) -> list[float]:
    """Return the values that codes stand for, increasing, from 0 or -1 to 1.

    In each decade 10^-e to 10^(1-e) lie evenly spaced values in the middle of 2^(bits - 2 - e) equal parts (twice
    as many without signs), for e = 0 ... bits - 2; with 0 and 1 these are 2^bits.

    The published table has no -1, so that a block whose largest number is negative shrinks each time it is
    written, in 4 bits by 11 %. Here the lowest value is -1 instead.

    >>> dynamic_table(3, signed=True)
    [-1.0, -0.325, -0.055, 0.0, 0.055, 0.325, 0.775, 1.0]

    References: Dettmers, "8-bit approximations for parallelism in deep learning", 2016, arXiv 1511.04561;
    Dettmers et al., "8-bit optimizers via block-wise quantization", 2022, arXiv 2110.02861.
    """
    found = [0.0, 1.0]
    for e in range(bits - 1):
        parts = 2 ** (bits - 2 - e) * (1 if signed else 2)
        found += [(0.1 + 0.9 * (i + 0.5) / parts) / 10**e for i in range(parts)]
    if signed:
        mirrored = sorted(-value for value in found if 0 < value < 1)
        found += [-1.0, *mirrored[1:]]
    return sorted(round(value, 15) for value in found)


def encode(values: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Write (k, n) numbers as codes, each row in blocks of ``block`` neighbours with a scale.

    Every number gets the nearest value of a table times the largest size in its block. A block with a negative
    number gets the table with signs, and a negative scale. In other blocks all bits serve sizes, and what is
    above zero stays above zero, so that what is divided by it stays finite.

    Returns:
        packed codes (k, ceil(n / 8) * bits) uint8, and scales (k, ceil(n / block)) float32.
    """
    n = values.shape[-1]
    blocks = _blocks(values.float(), block)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    largest, signed = torch.maximum(-low, high), low < 0
    blocks = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)
    codes = _nearest(blocks, signed, bits)
    codes = torch.where(signed, codes, codes.clamp_min((blocks > 0).to(codes.dtype)))
    scales = torch.where(signed, -largest, largest).squeeze(-1)
    return pack_fitting(codes.to(torch.uint8).flatten(1)[:, :n], bits), scales


def decode(packed: Tensor, scales: Tensor, n: int, bits: int, block: int) -> Tensor:
    """Return the (k, n) numbers of :func:`encode`, in float32."""
    codes = _blocks(unpack(packed, bits)[:, :n], block).int()
    signed = (scales < 0)[..., None]
    values = _tables(bits, packed.device)[codes + (signed.int() << bits)]
    return (values * scales.abs()[..., None]).flatten(1)[:, :n]


def _blocks(values: Tensor, block: int) -> Tensor:
    """(k, n) -> (k, blocks, block), with zeros at the end."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % block))
    return padded.view(len(values), padded.shape[-1] // block, block)


def _nearest(values: Tensor, signed: Tensor, bits: int) -> Tensor:
    """Return the codes of numbers from -1 to 1.

    Their upper 16 bits tell the code up to one, and a comparison the rest: much faster than a search.
    """
    if values.is_meta:  # only counted; tables that are made now would be kept without their values
        return torch.zeros_like(values, dtype=torch.int32)
    upper = ((values.view(torch.int32) >> 16) & (SHORT - 1)).add_(signed.int() * SHORT)
    codes = _starts(bits, values.device)[upper]
    return codes + (values > _middles(bits, values.device)[codes + (signed.int() << bits)])


@functools.cache
def _tables(bits: int, device: torch.device) -> Tensor:
    """The table without signs, and then that with signs, (2 * 2^bits,)."""
    return torch.tensor(dynamic_table(bits, signed=False) + dynamic_table(bits, signed=True), device=device)


@functools.cache
def _middles(bits: int, device: torch.device) -> Tensor:
    """Where one value ends to be the nearest and the next begins, for both tables; after the last, infinity."""
    found = [_middle(bits, signed, device) for signed in (False, True)]
    return torch.cat([torch.nn.functional.pad(each, (0, 1), value=torch.inf) for each in found])


def _middle(bits: int, signed: bool, device: torch.device) -> Tensor:
    table = torch.tensor(dynamic_table(bits, signed=signed), dtype=torch.float64, device=device)
    return ((table[1:] + table[:-1]) / 2).float()


@functools.cache
def _starts(bits: int, device: torch.device) -> Tensor:
    """The code of the lowest of all numbers with the same upper 16 bits, for both tables."""
    lowest = torch.arange(SHORT, device=device) << 16
    lowest = torch.where(lowest >= 2**31, (lowest | (SHORT - 1)) - 2**32, lowest).int().view(torch.float32)
    found = [torch.bucketize(lowest, _middle(bits, signed, device)) for signed in (False, True)]
    return torch.cat(found).int()
