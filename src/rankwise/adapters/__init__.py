"""Few trained numbers beside frozen weights."""

from .ada_lora import AdaLora
from .bat import Bat
from .eva import Eva
from .lamda import Lamda
from .loldu import Loldu
from .lora import Lora
from .miss import Miss
from .pissa import Pissa
from .svfit import Svfit

__all__ = ["AdaLora", "Bat", "Eva", "Lamda", "Loldu", "Lora", "Miss", "Pissa", "Svfit"]
