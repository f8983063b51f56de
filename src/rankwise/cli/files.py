"""Texts that a command reads, and paths that it will write: all checked before the long work starts."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.files import write_text
from ..core.report import Report
from ..core.spelling import meant
from ..models.examples import is_lines, read_lines
from ..models.texts import embedded_texts, read_text


@dataclass(frozen=True)
class Text:
    """A text, what reports call it, and where it is from."""

    name: str
    origin: str
    content: str


def named_texts(flag: str, words: Sequence[str]) -> list[Text]:
    """Read the texts of ``NAME=FILE`` words; the name of an embedded text stands for itself.

    Of JSON lines the texts are put one after the other.

    Raises:
        ValueError: if a word is neither, a name is given twice, or a file is missing, unreadable or empty.
    """
    found: dict[str, Text] = {}
    for word in words:
        name, equals, file = word.partition("=")
        known = embedded_texts()
        if equals and name and file:
            text = _joined(name, str(Path(file).resolve()), _read(flag, file))
        elif not equals and word in known:
            text = Text(word, f"embedded {word}", known[word])
        else:
            raise ValueError(
                f"{flag} takes NAME=FILE or the name of an embedded text ({', '.join(known)}), got {word!r}; "
                f"{meant(word, known) or f'such as {flag} mine={word}'}".rstrip()
            )
        if text.name in found:
            raise ValueError(f"{flag}: the name {text.name!r} is given twice; give each text its own name.")
        found[text.name] = text
    return list(found.values())


def data_texts(words: Sequence[str]) -> list[Text]:
    """Read the calibration texts, files or embedded ones; "self" or nothing gives no text.

    Raises:
        ValueError: if "self" is mixed with texts, a text is given twice, or a file is missing, unreadable or
            empty.
    """
    if "self" in words and len(words) > 1:
        raise ValueError("--data self cannot be combined with texts; give either self or files.")
    if not words or words[0] == "self":
        return []
    found: dict[str, Text] = {}
    for word in words:
        parts = texts_of("--data", word)
        text = _joined(parts[0].name, parts[0].origin, parts)
        if text.origin in found:
            raise ValueError(f"--data: the text {word} is given twice; give each text once.")
        found[text.origin] = text
    return list(found.values())


def texts_of(flag: str, word: str) -> list[Text]:
    """Read a file, of which each JSON line is a text of its own, or an embedded text.

    Raises:
        ValueError: if there is none such, or one is unreadable or empty.
    """
    embedded = embedded_texts()
    if word in embedded and not Path(word).is_file():
        return [Text(word, f"embedded {word}", embedded[word])]
    if not Path(word).exists() and (hint := meant(word, embedded)):
        raise ValueError(f"{flag}: the text {word} does not exist; {hint}".rstrip())
    return _read(flag, word)


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


def check_files(json: Path | None, html: Path | None, out: Path | None = None) -> None:
    """Raise unless both files of a report can be written, beside a folder that will be there then."""
    check_file("--json", json)
    check_file("--html", html)
    given = {"--out": out, "--json": json, "--html": html}
    for (one, path), (other, same) in itertools.combinations(given.items(), 2):
        if path is not None and same is not None and path.resolve() == same.resolve():
            raise ValueError(f"{one} and {other} are both {path}; give each a path of its own.")


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


def _read(flag: str, file: str) -> list[Text]:
    """Read a file: one text, or one of each JSON line."""
    origin = str(Path(file).resolve())
    if not is_lines(file):
        texts = [Text(file, origin, read_text(file))]
    else:
        texts = [Text(place, origin, _words(record.get("text"))) for place, record in read_lines(file)]
    for text in texts:
        if not text.content.strip():
            lack = 'has no "text" with words in it' if is_lines(file) else "is empty; give one with words in it"
            raise ValueError(f"{flag}: the text {text.name} {lack}.")
    return texts


def _words(value: Any) -> str:
    """Return a text, or nothing in place of what is none."""
    return value if isinstance(value, str) else ""


def _joined(name: str, origin: str, parts: Sequence[Text]) -> Text:
    return Text(name, origin, "\n".join(part.content for part in parts))


def _check_parent(flag: str, path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {parent} does not exist; make it first.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{flag} {path}: the folder {parent} cannot be written; give another path.")
