"""Ways to turn gradients into steps, for healing."""

from .adam import Adam

__all__ = ["Adam"]
