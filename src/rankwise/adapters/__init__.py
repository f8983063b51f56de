"""Few trained numbers beside frozen weights."""

from .bat import Bat
from .eva import Eva
from .lora import Lora
from .miss import Miss

__all__ = ["Bat", "Eva", "Lora", "Miss"]
