"""The orthogonal cosine transform (DCT-II)."""

import math

import torch
from torch import Tensor


def cosine_rows(chosen: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return rows of the orthogonal (size, size) cosine matrix, (..., r, size) for numbers of rows (..., r).

    Row i is sqrt(2 / size) cos(pi i (2 j + 1) / (2 size)), and the first is divided by sqrt(2).

    >>> rows = cosine_rows(torch.arange(4), 4, torch.float64)
    >>> torch.allclose(rows @ rows.mT, torch.eye(4, dtype=torch.float64))
    True
    """
    places = 2 * torch.arange(size, device=chosen.device) + 1
    turns = (chosen[..., None].long() * places) % (4 * size)  # exact, so that high rows are as good as low ones
    rows = torch.cos(turns.to(dtype) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    return torch.where(chosen[..., None] == 0, math.sqrt(1 / size), rows).to(dtype)


def cosine_transform(values: Tensor) -> Tensor:
    """Return the cosine matrix times (..., size, l) by a fast Fourier transform of rows in another order.

    References: Makhoul, "A fast cosine transform in one and two dimensions", 1980.
    """
    size = values.shape[-2]
    shuffled = torch.cat([values[..., ::2, :], values[..., 1::2, :].flip(-2)], dim=-2)
    frequencies = torch.fft.fft(shuffled, dim=-2)
    angles = torch.arange(size, device=values.device, dtype=values.dtype) * (math.pi / (2 * size))
    real = frequencies.real * angles.cos()[:, None] + frequencies.imag * angles.sin()[:, None]
    real *= math.sqrt(2 / size)
    real[..., 0, :] *= math.sqrt(0.5)
    return real
