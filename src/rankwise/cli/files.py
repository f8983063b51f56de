"""Texts that a command reads, and paths that it will write: all checked before the long work starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.files import write_text
from ..core.report import Report
from ..models.texts import embedded_texts, read_text


@dataclass(frozen=True)
class Text:
    """A text, what reports call it, and where it is from."""

    name: str
    origin: str
    content: str


def named_texts(flag: str, words: Sequence[str]) -> list[Text]:
    """Read the texts of ``NAME=FILE`` words; the name of an embedded text stands for itself.

    Raises:
        ValueError: if a word is neither, a name is given twice, or a file is missing, unreadable or empty.
    """
    found: dict[str, Text] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if equals and name and file:
            text = Text(name, str(Path(file).resolve()), read_text(file))
        elif not equals and word in (embedded := embedded_texts()):
            text = Text(word, f"embedded {word}", embedded[word])
        else:
            known = ", ".join(embedded_texts())
            raise ValueError(f"{flag} takes NAME=FILE or the name of an embedded text ({known}), got {word!r}.")
        if text.name in found:
            raise ValueError(f"{flag}: the name {text.name!r} is given twice; give each text its own name.")
        found[text.name] = _filled(flag, text)
    return list(found.values())


def data_texts(words: Sequence[str]) -> list[Text]:
    """Read the calibration texts, files or embedded ones; "self" or nothing gives no text.

    Raises:
        ValueError: if "self" is mixed with texts, or a file is missing, unreadable or empty.
    """
    if "self" in words and len(words) > 1:
        raise ValueError("--data self cannot be combined with texts; give either self or files.")
    if not words or words[0] == "self":
        return []
    embedded = embedded_texts()
    found = []
    for word in words:
        if word in embedded and not Path(word).is_file():
            text = Text(word, f"embedded {word}", embedded[word])
        else:
            text = Text(word, str(Path(word).resolve()), read_text(word))
        found.append(_filled("--data", text))
    return found


def check_file(flag: str, path: Path | None) -> None:
    """Raise unless a file can be written at a path, or into what is there and is no ordinary file."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; give the path of a file.")
    if not path.exists() or path.is_file():
        _check_parent(flag, path.resolve())
    elif not os.access(path, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written; give another path.")


def check_files(json: Path | None, html: Path | None) -> None:
    """Raise unless both files of a report can be written."""
    check_file("--json", json)
    check_file("--html", html)
    if json is not None and html is not None and json.resolve() == html.resolve():
        raise ValueError(f"--json and --html are both {json}; give each a path of its own.")


def check_folder(flag: str, path: Path | None) -> None:
    """Raise unless a new folder can be made at a path."""
    if path is None:
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{flag} {path} exists already; remove it or give another path.")
    _check_parent(flag, path)


def write_report(report: Report, json: Path | None, html: Path | None) -> None:
    """Write a report to the files that were asked for."""
    if json is not None:
        write_text(json, report.to_json() + "\n")
    if html is not None:
        write_text(html, report.to_html())


def _filled(flag: str, text: Text) -> Text:
    if not text.content.strip():
        raise ValueError(f"{flag}: the text {text.origin} is empty; give one with words in it.")
    return text


def _check_parent(flag: str, path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{flag} {path}: the folder {parent} cannot be written; give another path.")
