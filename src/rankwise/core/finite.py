"""Whether tensors hold numbers alone."""

import math

from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; nothing of its size is made, but of numbers of 8 bits.

    >>> import torch
    >>> is_finite(torch.ones(2)), is_finite(torch.tensor([1.0, torch.nan])), is_finite(torch.tensor([3]))
    (True, False, True)
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    return all(math.isfinite(end) for end in wide.aminmax())
