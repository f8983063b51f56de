"""Second-order methods, one a file."""

from .ekfac import Ekfac
from .hylo import HyLo
from .kfac import Kfac
from .mfac import MFac
from .sngd import Sngd

__all__ = [
    "Ekfac",
    "HyLo",
    "Kfac",
    "MFac",
    "Sngd",
]
