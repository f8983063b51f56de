"""Few trained numbers beside frozen weights."""

from .eva import Eva
from .householder import Householder
from .lora import Lora
from .snella import Snella
from .tera import Tera

__all__ = ["Eva", "Householder", "Lora", "Snella", "Tera"]
