"""The command line: ``rankwise adapt``, ``compress``, ``evaluate`` and so on, one a file."""

from .adapt import adapt
from .app import app, main
from .compress import compress
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .listing import methods
from .narrow import narrow
from .plan import plan
from .start import quickstart
from .train import train

__all__ = [
    "adapt",
    "app",
    "compress",
    "evaluate",
    "export",
    "inspect",
    "main",
    "methods",
    "narrow",
    "plan",
    "quickstart",
    "train",
]
