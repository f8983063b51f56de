"""Second-order methods, one a file."""

from .hylo import HyLo
from .sngd import Sngd

__all__ = ["HyLo", "Sngd"]
