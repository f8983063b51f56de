"""Where files are kept, and files and folders that appear whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def digest_of_file(file: Path) -> str:
    """Return a hash of a file, which is not mapped, as mapped pages count as memory."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Have errors of the disk name what could not be written, where they name no file.

    Raises:
        OSError: if the disk does not take what is written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # what safetensors raises on a full disk is no OSError
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise OSError(f"{path} could not be written: {' '.join(str(words).split())}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it must hold one JSON object.")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file under a temporary name and rename it.

    A link stays, and the file that it leads to is replaced. What is there and is no ordinary file, such as a
    pipe, is written into.

    Raises:
        OSError: if the disk does not take what is written.
    """
    with named(path):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        path = path.resolve()
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
    folder = Path(folder).resolve()  # a link is followed
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; remove it or give another path.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with named(folder):
            yield temporary
            share(temporary)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def share(folder: Path) -> None:
    """Let all who may read a new folder read its files, which libraries make for their user alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
