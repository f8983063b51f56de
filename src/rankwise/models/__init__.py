from .causal import generate
from .evaluate import evaluate, sizes
from .sampling import sample
from .speed import speed
from .texts import embedded_texts, read_text

__all__ = ["embedded_texts", "evaluate", "generate", "read_text", "sample", "sizes", "speed"]
