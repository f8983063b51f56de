"""Few trained numbers beside frozen weights."""

from .ada_lora import AdaLora
from .bat import Bat
from .eva import Eva
from .householder import Householder
from .lamda import Lamda
from .loldu import Loldu
from .lora import Lora
from .miss import Miss
from .pissa import Pissa
from .snella import Snella
from .sst import Sst
from .svfit import Svfit
from .tera import Tera

__all__ = [
    "AdaLora",
    "Bat",
    "Eva",
    "Householder",
    "Lamda",
    "Loldu",
    "Lora",
    "Miss",
    "Pissa",
    "Snella",
    "Sst",
    "Svfit",
    "Tera",
]
