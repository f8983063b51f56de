"""Rounding at random to one of the two nearest numbers, so that the result is right on average."""

import torch
from torch import Generator, Tensor

DROPPED = 16  # bits of float32 that bfloat16 has not


def stochastic_bfloat16(values: Tensor, generator: Generator) -> Tensor:
    """Round float32 to bfloat16 so that the expected result is the value itself.

    Random bits are added below the last bit that stays, and the rest is cut off: a value is rounded away from
    zero with a probability that is its distance from the neighbour nearer to zero, in units of their distance.
    What bfloat16 holds stays as it is; what is not finite is rounded to the nearest.

    >>> values = torch.full((100_000,), 1 + 2.0**-10)  # a step is 2^-7 here
    >>> rounded = stochastic_bfloat16(values, torch.Generator().manual_seed(0)).float()
    >>> rounded.unique().tolist(), round(float((rounded.mean() - 1) * 2**10), 1)
    ([1.0, 1.0078125], 1.0)
    """
    shape, device = values.shape, values.device
    noise = torch.randint(2**DROPPED, shape, dtype=torch.int32, device=device, generator=generator)
    cut = (values.view(torch.int32) + noise) & -(2**DROPPED)
    return torch.where(values.isfinite(), cut.view(torch.float32), values).bfloat16()
