"""Second-order methods, one a file."""

from .hylo import HyLo
from .sngd import Sngd

__all__ = [
    "HyLo",
    "Sngd",
]
from .ekfac import Ekfac
from .kfac import Kfac

__all__ = [
    "Ekfac",
    "Kfac",
    "Sngd",
]
