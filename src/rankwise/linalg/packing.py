"""Small integers, several to a byte."""

from functools import reduce

import torch
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack (m, n) integers in 0 ... 2**bits - 1 into (m, ceil(n / 8) * bits) bytes.

    The bits of a code are split into fields of 4, 2 and 1 (or 8) bits, which fill bytes evenly; the fields of
    all columns follow one another, the lowest bits first. Columns are padded with zeros to a multiple of 8.

    >>> import torch
    >>> unpack(pack(torch.tensor([[5, 0, 7]]), 3), 3).tolist()
    [[5, 0, 7, 0, 0, 0, 0, 0]]
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes of {bits} bits are in 0 ... {2**bits - 1}.")
    return pack_fitting(codes, bits)


def pack_fitting(codes: Tensor, bits: int) -> Tensor:
    """Do what :func:`pack` does without looking at the numbers, which would wait for a device."""
    rest = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % 8))
    fields = []
    for width in _fields(bits):
        part = (rest & (2**width - 1)).view(len(rest), rest.shape[1] * width // 8, 8 // width)
        fields.append((part << _shifts(width, part)).sum(-1, dtype=torch.uint8))
        rest = rest >> width if width < 8 else rest
    return torch.cat(fields, dim=1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the (m, n) uint8 integers of :func:`pack`, with n a multiple of 8; those of 8 bits as they are."""
    eighths, low, parts = packed.shape[1] // bits, 0, []
    for width, field in zip(
        _fields(bits), packed.split([eighths * w for w in _fields(bits)], dim=1), strict=True
    ):
        parts.append(_looked_up(_table(width, packed.device) << low, field))
        low += width
    return reduce(torch.add, parts)


def spread(values: Tensor, bitmap: Tensor) -> Tensor:
    """Write (k,) numbers, row by row, where bits of an (m, b) uint8 ``bitmap`` are set: (m, 8 b), else zeros.

    Not differentiable. ``masked_scatter`` does the same one by one; here all entries of the result are fetched at
    once, from their byte's first number on.

    >>> import torch
    >>> spread(torch.tensor([2.0, 3.0]), pack(torch.tensor([[0, 1, 0], [1, 0, 0]]), 1))[:, :3].tolist()
    [[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]]
    """
    m, columns = len(bitmap), 8 * bitmap.shape[1]
    if not len(values):
        return values.new_zeros(m, columns)
    words, integer = _WORDS[values.element_size()], torch.int32 if len(values) < 2**31 else torch.int64
    bits, which = _table(1, bitmap.device), bitmap.reshape(-1).int()
    upto = bits.cumsum(1, dtype=integer)
    counts = upto[:, -1].index_select(0, which)
    first = (counts.cumsum(0, dtype=integer) - counts).clamp_(max=len(values) - 1)
    places = ((upto - 1) * bits).index_select(0, which).add_(first[:, None])
    found = values.view(words).index_select(0, places.view(-1))
    found &= bits.to(words).neg().index_select(0, which).view(-1)  # not times zero, which infinity is not
    return found.view(values.dtype).view(m, columns)


def packed_bytes(columns: int, bits: int) -> int:
    """How many bytes a row of codes takes."""
    return -(-columns // 8) * bits


def _fields(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _shifts(width: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)


def _table(width: int, device: torch.device) -> Tensor:
    """Return the codes in each byte, (256, 8 / width) uint8."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    return (byte[:, None] >> _shifts(width, byte)) & (2**width - 1)


def _looked_up(table: Tensor, field: Tensor) -> Tensor:
    """Return a row of the table for each of (m, b) bytes, beside each other; a row is fetched as one word."""
    if table.shape[1] == 1:
        return field
    words = table.view(_WORDS[table.shape[1]]).view(-1)
    return words.index_select(0, field.reshape(-1).int()).view(field.shape).view(torch.uint8)
