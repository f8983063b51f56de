"""Few trained numbers beside frozen weights."""

from .ada_lora import AdaLora
from .eva import Eva
from .lamda import Lamda
from .lora import Lora
from .sst import Sst

__all__ = ["AdaLora", "Eva", "Lamda", "Lora", "Sst"]
