"""Second-order methods, one a file."""

from .mfac import MFac
from .sngd import Sngd

__all__ = ["MFac", "Sngd"]
