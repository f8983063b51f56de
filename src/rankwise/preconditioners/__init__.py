"""Ways to turn gradients into steps, for healing."""

from .adam import Adam
from .kronecker_factored import KroneckerFactored

__all__ = ["Adam", "KroneckerFactored"]
