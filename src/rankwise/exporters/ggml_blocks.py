"""How GGUF stores numbers: plain types, and blocks of 32 low-bit integers with a scale and an offset."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.finite import is_finite
from ..linalg import pack, unpack
from ..matrices import Quantized

BLOCK = 32
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Rows of bytes, (..., bytes of a row) uint8, and the name of their type in GGUF."""

    kind: str
    data: np.ndarray


def plain(tensor: Tensor, kind: str) -> Stored:
    """Round a tensor to f32, f16 or bf16.

    Raises:
        ValueError: if a number is too large for the type.
    """
    rounded = tensor.to(FLOATS[kind]).contiguous()
    if bool(rounded.isinf().any()) and not bool(tensor.isinf().any()):
        raise ValueError(
            f"a number of size {float(tensor.abs().max()):.3g} does not fit into {kind}; use bf16 or f32."
        )
    return Stored(kind.upper(), rounded.view(torch.uint8).numpy())


def low_bit(matrix: Quantized, rows: Tensor | None = None) -> Stored | None:
    """Store low-bit integers in blocks that hold exactly the same numbers, or return None if there are none.

    Q4_1 holds up to 4 bits and Q5_1 holds 5, as ``scale * code + offset`` with both in float16. A group of
    columns must be some whole blocks, and scale and offset must be float16 numbers.

    Args:
        matrix: of any number of bits.
        rows: (m,) the order in which its rows are stored.
    """
    m, n = matrix.shape
    scale, offset = (_exact_halves(t.detach()) for t in (matrix.scale, matrix.offset))
    if matrix.bits > 5 or n % BLOCK or matrix.group % BLOCK or scale is None or offset is None:
        return None
    rows = torch.arange(m) if rows is None else rows
    per_group = matrix.group // BLOCK
    halves = [t[rows].repeat_interleave(per_group, 1)[:, : n // BLOCK, None] for t in (scale, offset)]
    codes = unpack(matrix.packed, matrix.bits)[rows, :n].view(m, n // BLOCK, BLOCK)
    fields = [half.contiguous().view(torch.uint8) for half in halves]
    if matrix.bits == 5:
        fields.append(pack((codes >> 4).view(-1, BLOCK), 1).view(m, n // BLOCK, 4))
    low = codes & 15
    fields.append(low[..., :16] | low[..., 16:] << 4)
    return Stored("Q5_1" if matrix.bits == 5 else "Q4_1", torch.cat(fields, -1).flatten(1).numpy())


def _exact_halves(tensor: Tensor) -> Tensor | None:
    halves = tensor.half()
    return halves if is_finite(halves) and torch.equal(halves.to(tensor.dtype), tensor) else None
