"""Texts to evaluate and calibrate with: those that exist on every machine, and files."""

import gzip
import importlib.util
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_MODULES = (  # long-lived modules of the standard library; their order is the order of the text
    *("argparse", "bdb", "calendar", "cmd", "configparser", "copy", "csv", "difflib", "doctest", "fractions"),
    *(
        "ftplib",
        "getopt",
        "heapq",
        "imaplib",
        "inspect",
        "locale",
        "mailbox",
        "optparse",
        "pathlib",
        "pickle",
    ),
    *(
        "plistlib",
        "pprint",
        "random",
        "shutil",
        "smtplib",
        "statistics",
        "string",
        "tarfile",
        "textwrap",
        "zipfile",
    ),
)
_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}


def embedded_texts() -> dict[str, str]:
    """Return two texts that every CPython has, of two domains.

    ``topics`` is the help text of the language (technical English, 113k tokens for SmolLM2), ``python``
    the source of thirty modules of the standard library. Both depend on the version of Python, so figures
    are comparable only between runs on the same version.

    Raises:
        ValueError: if this Python was installed without the sources of its standard library.

    >>> sorted(embedded_texts())
    ['python', 'topics']
    """
    from pydoc_data.topics import topics

    return {"topics": "\n".join(topics.values()), "python": "\n".join(map(_source, _MODULES))}


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, plain or packed as ``.xz`` or ``.gz``.

    Raises:
        ValueError: if there is no such file, or it is damaged, or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f'text file "{path}" {there}; give the path of a plain, .gz or .xz file.')
    opener = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # some tools put a mark first
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f'text file "{path}" is not UTF-8 ({error}); convert it first.') from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f'text file "{path}" cannot be read ({error}); is it complete?') from error


def tokens(
    tokenizer: Any, text: str, *, limit: int | None = None, last: bool = False, name: str = "text"
) -> Tensor:
    """Turn a text into token ids, without special tokens.

    Args:
        tokenizer: of transformers; None, of a model that has none, is an error.
        text: any length.
        limit: keep at most so many tokens.
        last: keep the last ones, not the first.
        name: what errors call the text.

    Returns:
        (t,) integers.

    Raises:
        ValueError: if there is no tokenizer or not one token, or ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1 token, got {limit}.")
    if tokenizer is None:
        raise ValueError(
            f'the model has no tokenizer to read text "{name}" with; put the files of its tokenizer into its '
            "folder, or give token ids in Python."
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if ids.numel() == 0:
        raise ValueError(f'text "{name}" is empty; give a text of at least two tokens.')
    if limit is None:
        return ids
    return ids[-limit:] if last else ids[:limit]


def windows(ids: Tensor, window: int) -> list[Tensor]:
    """Cut (t,) token ids into consecutive windows; a shorter last one is kept if it holds two tokens or more.

    >>> [w.tolist() for w in windows(torch.arange(6), 4)], [w.tolist() for w in windows(torch.arange(5), 4)]
    ([[0, 1, 2, 3], [4, 5]], [[0, 1, 2, 3]])
    """
    if window < 2:
        raise ValueError(f"window must be >= 2 tokens, one to condition on and one to score, got {window}.")
    return [part for part in ids.split(window) if len(part) >= 2]


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    loader: Any = None if spec is None else spec.loader
    source = None if loader is None else loader.get_source(name)
    if source is None:
        raise ValueError(f"the source of Python's module {name!r} is not installed; give a text file instead.")
    return source
