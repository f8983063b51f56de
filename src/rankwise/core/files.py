"""Where files are kept, and text files that appear whole or not at all."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where models and samples are kept: ``RANKWISE_CACHE``, or ``~/.cache/rankwise``."""
    return Path(os.environ.get("RANKWISE_CACHE", "~/.cache/rankwise")).expanduser()


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, survive a loss of power from here on."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
