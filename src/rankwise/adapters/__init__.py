"""Few trained numbers beside frozen weights."""

from .ada_lora import AdaLora
from .bat import Bat
from .compacter import Compacter
from .eva import Eva
from .factor_lora import FactorLora
from .grad_norm_lorp import GradNormLorp
from .householder import Householder
from .kron_lora import KronLora
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
    "Compacter",
    "Eva",
    "FactorLora",
    "GradNormLorp",
    "Householder",
    "KronLora",
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
