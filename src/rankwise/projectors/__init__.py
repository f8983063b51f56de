"""Subspaces of gradients: how they are found, when they are found again, and what becomes of moments in them."""

from .carry import Keep, Reset, Rotate
from .cosine import Cosine, RandomOrthogonal
from .packed import Packed
from .randomised import Randomised
from .refresh import Backoff, EnergyDrop, Every
from .rows import LargestRows, RandomRows, RowBlock
from .svd import Svd
from .warm_power import WarmPower

__all__ = [
    "Backoff",
    "Cosine",
    "EnergyDrop",
    "Every",
    "Keep",
    "LargestRows",
    "Packed",
    "RandomOrthogonal",
    "RandomRows",
    "Randomised",
    "Reset",
    "Rotate",
    "RowBlock",
    "Svd",
    "WarmPower",
]
