"""Bounded functions of what is trained, which begin as the weights that are there."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..core.methods import Start
from ..matrices import Companded, Recomputed, StructuredMatrix


@dataclass(frozen=True, kw_only=True)
class CompandedStart(Start):
    """Train V in W = a arctan(V / b) instead of W, so that large weights are damped and small ones moved on.

    W begins as the weight that is there, new or trained before. The knee b is a number of standard deviations
    of W, and the slope at zero a / b is ``gain``, or more where that bound would cut off the largest weights.
    Any optimiser may train V; :func:`rankwise.fold` gives ordinary layers back.

    It is a matrix and no transform of steps, since a step in V is no multiple of a step in W, since V near the
    bound cannot be had back from a rounded W, and since a and b may be trained.

    Args:
        knee: b, in standard deviations of the weight.
        gain: a / b.
        learned: train a and b of each layer; give them, which are named ``log_height`` and ``log_width``, no
            decay.

    References: Cakaj, Mehnert, Yang, "Weight compander", 2023, arXiv 2306.16993; see
        :class:`rankwise.matrices.Companded` for what is not verified. The defaults are ours.
    """

    knee: float = 3.0
    gain: float = 1.2
    learned: bool = False

    def __post_init__(self) -> None:
        for name in ("knee", "gain"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}.")

    def matrix(self, m: int, n: int, generator: Generator) -> StructuredMatrix:
        """Draw the weight as ``nn.Linear`` does."""
        bound = n**-0.5
        return self.of(torch.empty(m, n).uniform_(-bound, bound, generator=generator), generator)

    def of(self, weight: Tensor, generator: Generator) -> StructuredMatrix:
        """Take the values of a weight (m, n)."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        spread = float(weight.double().square().mean().sqrt()) or weight.shape[1] ** -0.5
        width = self.knee * spread
        needed = 1.1 * float(weight.abs().max()) * 2 / math.pi
        height = max(self.gain * width, needed)
        return Recomputed(Companded.of(weight, height=height, width=width, learned=self.learned))
