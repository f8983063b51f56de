"""A long work in steps that a killed run takes up again: the files of each appear whole, or not at all."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from torch import Tensor

from .files import digest_of_file, sync, write_text

MANIFEST, LOCK = "manifest.json", "lock"


class Steps:
    """The finished steps of one work, each a folder of files, and a manifest that names them with their hashes.

    The same work may be started again at any time: a step that is there is not made again, and one whose files
    are missing or cut short is.

    Args:
        folder: for everything; made if it is missing.
        about: JSON data that the results depend on.

    Raises:
        ValueError: if the folder holds something else, or a work that was about something else, or one that
            another process is at.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, json.loads(json.dumps(about))
        self.known: dict[str, Any] = {}
        path = folder / MANIFEST
        if not self.begun(folder) and folder.exists() and (not folder.is_dir() or _foreign(folder)):
            raise ValueError(f"{folder} exists, but is no unfinished run; remove it or give another path.")
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(folder)
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def begun(folder: Path) -> bool:
        """Whether a folder holds the steps of a work."""
        return (folder / MANIFEST).is_file()

    def run(
        self, name: str, make: Callable[[Path], Mapping[str, Any]], about: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the figures of a step: those of an earlier run, or new ones.

        Args:
            name: of the step, and of its folder.
            make: writes files into a folder and returns the figures, which are JSON data.
            about: JSON data that this step alone depends on; if it has changed, the step is made again.

        Raises:
            OSError: if something cannot be read or written; the steps before are kept.
        """
        if self.has(name) and self.known[name]["about"] == about:
            return self.known[name]["figures"]
        start, temporary = time.perf_counter(), self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.mkdir()
            figures = dict(make(temporary))
            files = {}
            for file in sorted(temporary.iterdir()):
                sync(file)
                files[file.name] = [file.stat().st_size, digest_of_file(file)]
            sync(temporary)
            if self.known.pop(name, None) is not None:
                self._write()  # else a kill before the end would leave new files under an old hash
            shutil.rmtree(self.folder / name, ignore_errors=True)
            temporary.rename(self.folder / name)
            sync(self.folder)
            seconds = time.perf_counter() - start
            self.known[name] = {"about": about, "files": files, "figures": figures, "seconds": seconds}
            self._write()
        except OSError as error:
            raise OSError(
                f"step {name} failed: {error}; the steps before it are kept in {self.folder}: "
                "when the cause is gone, run the same again."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return figures

    def remove(self) -> None:
        """Remove everything, what says so last; the work is over."""
        self.close()
        for path in [path for path in self.folder.iterdir() if path.name != MANIFEST]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another run continue."""
        self.lock.close()

    def has(self, name: str) -> bool:
        """Whether a step is finished and its files are there."""
        files = self.known[name]["files"] if name in self.known else {}
        sizes = (_size(self.folder / name / file) == size for file, (size, _) in files.items())
        return name in self.known and all(sizes)

    def figures(self, name: str) -> dict[str, Any]:
        """Return the figures of a finished step."""
        return self.known[name]["figures"]

    def seconds(self) -> dict[str, float]:
        """Return how long each finished step took."""
        return {name: step["seconds"] for name, step in self.known.items()}

    def file(self, name: str, file: str) -> Path:
        """Return the path of a file of a finished step.

        Raises:
            ValueError: if it is not what was written.
        """
        path = self.folder / name / file
        if _size(path) is None or digest_of_file(path) != self.known[name]["files"][file][1]:
            raise ValueError(
                f"{path} is damaged; remove the folder {path.parent} and run the same again, which makes it anew."
            )
        return path

    def tensors(self, name: str, file: str) -> dict[str, Tensor]:
        """Read a file of a finished step, which :meth:`file` checks."""
        with safe_open(self.file(name, file), framework="pt") as opened:
            return {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 (no mapping)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            self._write()
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self.known, before = found["steps"], found["about"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; remove {self.folder} to start again.") from error
        self._compare(before)
        for left in self.folder.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def _compare(self, before: Mapping[str, Any]) -> None:
        for key in self.about.keys() | before.keys():
            if (old := before.get(key)) != (new := self.about.get(key)):
                raise ValueError(
                    f"{self.folder} holds an unfinished run with another {key}: {_short(old)}, not "
                    f"{_short(new)}; run it again as it was, or remove the folder."
                )

    def _write(self) -> None:
        text = json.dumps({"about": self.about, "steps": self.known}, indent=1)
        write_text(self.folder / MANIFEST, text + "\n")


def _foreign(folder: Path) -> bool:
    """Whether there is a file that a run does not leave when it is killed at its very beginning."""
    return any(file.name != LOCK and not file.name.startswith(f".{MANIFEST}.") for file in folder.iterdir())


def _lock(folder: Path) -> IO[str]:
    """Return an open file that only one process has at a time, where the system knows such locks."""
    opened = (folder / LOCK).open("w")
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            opened.close()
            raise ValueError(f"another run is at work in {folder}; wait until it has ended.") from error
    return opened


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
