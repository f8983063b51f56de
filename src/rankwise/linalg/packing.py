"""Small integers, several to a byte."""

import torch
from torch import Tensor


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
    """Return the (m, n) uint8 integers of :func:`pack`, with n a multiple of 8."""
    eighths = packed.shape[1] // bits
    codes, low = torch.zeros((), dtype=torch.uint8, device=packed.device), 0
    for width, field in zip(
        _fields(bits), packed.split([eighths * w for w in _fields(bits)], dim=1), strict=True
    ):
        part = (field[:, :, None] >> _shifts(width, field)) & (2**width - 1)
        codes, low = codes + (part.flatten(1) << low), low + width
    return codes


def packed_bytes(columns: int, bits: int) -> int:
    """How many bytes a row of codes takes."""
    return -(-columns // 8) * bits


def _fields(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _shifts(width: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)
