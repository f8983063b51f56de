"""Rounding at random to one of the two nearest numbers, so that the result is right on average."""

import torch
from torch import Generator, Tensor

DROPPED = 16  # bits of float32 that bfloat16 has not
MARGIN = 16  # of the range of a group, beyond which its grid reaches a part


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
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(2**DROPPED)).view(torch.float32).bfloat16()
    del noise
    return torch.where(values.isfinite(), rounded, values.bfloat16())


def integer_grid(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a scale and an offset for groups (..., g), whose 256 values reach a 16th of the range beyond it."""
    low, high = values.aminmax(dim=-1)
    tiny = torch.finfo(values.dtype).tiny
    spread = torch.maximum(high - low, torch.maximum(low.abs(), high.abs()) * 2.0**-10).clamp_min(tiny * 2**10)
    return spread * (1 + 2 / MARGIN) / 255, low - spread / MARGIN


def add_to_integers(
    codes: Tensor, scale: Tensor, offset: Tensor, change: Tensor, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to numbers ``scale * code + offset`` and round them so that the expected result is the sum.

    A group keeps its grid until a number leaves it: on a grid that moves with each step, all numbers of the group
    would be rounded anew at random, and would wander off. So what does not change keeps its code.

    Args:
        codes: (..., g) integers 0 ... 255.
        scale: (...).
        offset: (...).
        change: (..., g), in the type of the scale.
        generator: of the random numbers.

    Returns:
        codes (uint8), scales and offsets, all new.

    >>> codes, scale, offset = torch.full((1, 10000), 7), torch.tensor([0.5]), torch.tensor([-1.0])
    >>> change = torch.full((1, 10000), 0.1)
    >>> codes, *_ = add_to_integers(codes, scale, offset, change, torch.Generator().manual_seed(0))
    >>> codes.unique().tolist(), round(float((0.5 * codes - 1).mean()), 2)
    ([7, 8], 2.6)
    """
    places = codes + change / scale[..., None]
    left = ((places < 0) | (places > 255)).any(-1)
    values = codes * scale[..., None] + offset[..., None] + change
    fresh_scale, fresh_offset = integer_grid(values)
    scale, offset = torch.where(left, fresh_scale, scale), torch.where(left, fresh_offset, offset)
    places = torch.where(left[..., None], (values - offset[..., None]) / scale[..., None], places)
    noise = torch.rand(places.shape, dtype=places.dtype, device=places.device, generator=generator)
    return (places + noise).floor_().clamp_(0, 255).to(torch.uint8), scale, offset
