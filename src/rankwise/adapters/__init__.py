"""Few trained numbers beside frozen weights."""

from .bat import Bat
from .eva import Eva
from .loldu import Loldu
from .lora import Lora
from .miss import Miss
from .pissa import Pissa
from .svfit import Svfit

__all__ = ["Bat", "Eva", "Loldu", "Lora", "Miss", "Pissa", "Svfit"]
