"""The command line: ``rankwise compress | evaluate | export | inspect | list | narrow | quickstart``."""

from .app import app, main
from .compress import compress
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .listing import methods
from .narrow import narrow
from .start import quickstart

__all__ = ["app", "compress", "evaluate", "export", "inspect", "main", "methods", "narrow", "quickstart"]
