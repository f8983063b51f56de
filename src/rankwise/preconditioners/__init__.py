"""Second-order methods, one a file."""

from .ekfac import Ekfac
from .kfac import Kfac
from .sngd import Sngd

__all__ = ["Ekfac", "Kfac", "Sngd"]
