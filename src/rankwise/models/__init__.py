"""Models in and out, and what they are measured with."""

from .causal import generate
from .classifier import load_classifier, read_labels
from .evaluate import evaluate, sizes
from .examples import read_examples
from .load import load, load_tokenizer
from .load_adapter import load_adapter
from .model_files import forget, predicted_bytes
from .packing import packed
from .sampling import sample
from .save import save
from .speed import speed
from .texts import embedded_texts, read_text, tokens

__all__ = [
    "embedded_texts",
    "evaluate",
    "forget",
    "generate",
    "load",
    "load_adapter",
    "load_classifier",
    "load_tokenizer",
    "packed",
    "predicted_bytes",
    "read_examples",
    "read_labels",
    "read_text",
    "sample",
    "save",
    "sizes",
    "speed",
    "tokens",
]
