"""Formats that other tools read. What ``__all__`` names is what ``rankwise export --to`` offers."""

from .absorbed import Absorbed
from .delta import Delta
from .dense import Dense
from .gguf import Gguf
from .lora import Lora
from .merged import Merged
from .onnx import Onnx

__all__ = ["Absorbed", "Delta", "Dense", "Gguf", "Lora", "Merged", "Onnx"]
