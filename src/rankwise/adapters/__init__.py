"""Few trained numbers beside frozen weights."""

from .compacter import Compacter
from .eva import Eva
from .householder import Householder
from .kron_lora import KronLora
from .lora import Lora
from .snella import Snella
from .tera import Tera

__all__ = ["Compacter", "Eva", "Householder", "KronLora", "Lora", "Snella", "Tera"]
