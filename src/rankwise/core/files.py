"""Where files are kept, and text files that appear whole or not at all."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where models and samples are kept: ``RANKWISE_CACHE``, or ``~/.cache/rankwise``."""
    return Path(os.environ.get("RANKWISE_CACHE", "~/.cache/rankwise")).expanduser()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
