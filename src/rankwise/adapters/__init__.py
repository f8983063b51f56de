"""Few trained numbers beside frozen weights."""

from .eva import Eva
from .householder import Householder
from .lora import Lora

__all__ = ["Eva", "Householder", "Lora"]
