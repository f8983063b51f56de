"""Models in and out, and what they are measured with."""

from .causal import generate
from .evaluate import evaluate, sizes
from .formats import load_adapter, save
from .load import load, load_tokenizer
from .sampling import sample
from .save import forget, predicted_bytes
from .speed import speed
from .texts import embedded_texts, read_text, tokens

__all__ = [
    "embedded_texts",
    "evaluate",
    "forget",
    "generate",
    "load",
    "load_adapter",
    "load_tokenizer",
    "predicted_bytes",
    "read_text",
    "sample",
    "save",
    "sizes",
    "speed",
    "tokens",
]
