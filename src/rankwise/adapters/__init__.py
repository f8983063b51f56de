"""Few trained numbers beside frozen weights."""

from .eva import Eva
from .lora import Lora

__all__ = ["Eva", "Lora"]
