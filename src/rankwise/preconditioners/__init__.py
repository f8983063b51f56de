"""Second-order methods, one a file."""

from .sngd import Sngd

__all__ = ["Sngd"]
