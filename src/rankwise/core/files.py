"""Where files are kept, and files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


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


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary path beside a folder's, to be made and filled; it gets the folder's name at the end.

    If the block raises, nothing is left under either name.

    Raises:
        ValueError: if the folder holds something already.
        OSError: if the disk does not take what is written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it or give another path.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except SafetensorError as error:  # what it raises on a full disk is no OSError
        raise OSError(f"{folder} could not be written: {' '.join(str(error).split())}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
