"""Draws from many categorical distributions at once."""

import torch
from torch import Tensor


def draw_categorical(logits: Tensor, draw: Tensor) -> Tensor:
    """Draw from softmax distributions by inverting their cumulative sums.

    It needs one random number a row, where ``torch.multinomial`` draws one for every entry.

    Args:
        logits: (b, k).
        draw: (b, 1) uniform in [0, 1).

    Returns:
        (b, 1) indices.

    Raises:
        ValueError: if a logit is not finite.
    """
    below = logits.softmax(-1).cumsum(-1)  # in float32 only probabilities below 3e-8 are lost
    total = below[:, -1:]
    if not bool(total.isfinite().all()):
        raise ValueError(
            "the logits are not finite, so nothing can be drawn; check the model's weights, or use float32."
        )
    return torch.searchsorted(below, draw * total, right=True).clamp_max(logits.shape[-1] - 1)
