"""Layers whose Lipschitz constants are known, for :func:`rankwise.lipschitz_bound`."""

from .blend import Blend
from .bounded_attention import BoundedAttention
from .unit_gelu import UnitGelu

__all__ = ["Blend", "BoundedAttention", "UnitGelu"]
