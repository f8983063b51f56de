"""The bytes of tensors."""

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, row by row, (k,) uint8 on the CPU; a view where it is stored so.

    >>> bits(torch.tensor([[1, 2]], dtype=torch.int16))
    tensor([1, 0, 2, 0], dtype=torch.uint8)
    """
    flat = tensor.detach().cpu().contiguous().view(-1)
    dense = flat.as_strided(flat.shape, (1,), flat.storage_offset())  # one number alone may have any stride
    return dense.view(torch.uint8)
