"""Formats that other tools read. What ``__all__`` names is what ``rankwise export --to`` offers."""

from .dense import Dense
from .gguf import Gguf
from .onnx import Onnx

__all__ = ["Dense", "Gguf", "Onnx"]
