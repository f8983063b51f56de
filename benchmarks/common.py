"""What the benchmarks share: texts, the environment, and results that survive an interrupt."""

import contextlib
import json
import lzma
import os
import platform
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import rankwise
from rankwise.core.methods import Compressor
from rankwise.core.surgery import select, set_module
from rankwise.models import embedded_texts

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that made a result."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rankwise": rankwise.__version__,
        "commit": commit.stdout.strip(),
    }


def command() -> str:
    """Return the command line of this run, without the place of the data."""
    words = list(sys.argv)
    for i, word in enumerate(words[:-1]):
        if word == "--data":
            words[i + 1] = "DATA"
    return "python " + shlex.join(words)


def texts(folder: str | None) -> dict[str, str]:
    """Return the evaluation texts: CPython's topics and, from ``folder``, wikitext2 valid and a C4 slice."""
    found = {"topics": embedded_texts()["topics"]}
    if folder:
        found["wikitext2"] = read(Path(folder) / "wikitext2" / "wiki.valid.raw.xz")
        found["c4"] = read(Path(folder) / "calib_mix" / "c4.utf8.xz")
    return found


def read(path: Path) -> str:
    """Read an .xz text."""
    with lzma.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read()


@dataclass(frozen=True)
class Remember(Compressor):
    """A method that decomposes a weight once and offers the same choices to every budget."""

    method: Compressor
    known: dict = field(default_factory=dict)

    @property
    def needs(self):
        return self.method.needs

    @property
    def comparable(self):
        return self.method.comparable

    def choices(self, weight, stats):
        key = weight.data_ptr()
        if key not in self.known:
            self.known[key] = self.method.choices(weight, stats)
        return self.known[key]


@contextlib.contextmanager
def restoring(model):
    """Put back the layers that a compression inside replaces."""
    before = {path: model.get_submodule(path) for site in select(model).values() for path in site.names}
    yield
    for path, layer in before.items():
        set_module(model, path, layer)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Count what a forward pass keeps for the backward pass, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no storage is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


def peak_saved_bytes(run: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Return the most bytes that graphs hold at one time while ``run`` runs, without known tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    live, most = [], 0

    class Kept:
        """A tensor that a graph holds."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Kept:
        nonlocal most
        kept = Kept(tensor)
        live[:] = [each for each in live if each() is not None]
        live.append(weakref.ref(kept))
        held = [each.tensor.untyped_storage() for ref in live if (each := ref()) is not None]
        most = max(most, sum({s.data_ptr(): s.nbytes() for s in held if s.data_ptr() not in own}.values()))
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        run()
    return most


class Rows:
    """Rows of a result, on disk as soon as they are known; a second run goes on where the first stopped."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.command = path, [], command()
        if path.exists():
            found = json.loads(path.read_text())
            self.rows = found["rows"]
            commands = [*found["command"].split(" && "), self.command]
            self.command = " && ".join(dict.fromkeys(commands))  # all that made the rows

    def has(self, **key: Any) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def find(self, **key: Any) -> dict[str, Any]:
        """Return the row with these values."""
        return next(row for row in self.rows if all(row.get(k) == v for k, v in key.items()))

    def add(self, **row: Any) -> None:
        """Print a row and write all of them."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Write all rows, such as after one was changed."""
        temporary = self.path.with_suffix(".tmp")
        content = {"command": self.command, "environment": environment(), "rows": self.rows}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self.path)
