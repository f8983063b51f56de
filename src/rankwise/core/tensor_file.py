"""Files of safetensors that are written and read some numbers at a time."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .bits import bits
from .files import digest_of_file, sync

PART = 2**24  # numbers that are read at once

_NAMES = {
    "complex64": "C64",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
KINDS = {vars(torch)[name]: kind for name, kind in _NAMES.items() if name in vars(torch)}  # older torch has fewer


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    parts: Callable[[str], Iterable[Tensor]] | None = None,
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write tensors into a file, part after part, and check that they read back the same.

    Args:
        file: to be made.
        tensors: by name, in the order in which they are written, but wider types come first.
        parts: makes the tensor of a name, or consecutive parts of it; nothing of a tensor is held when the next
            is made. Of ``tensors`` then the shapes and types alone count; the meta device will do.
        about: texts that stand in the header.

    Raises:
        ValueError: if safetensors has no such type, the parts have another type or together another size, or
            they do not read back.
        OSError: if the disk is full.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that all are aligned
    digest = hashlib.blake2b(digest_size=16)
    with file.open("wb") as opened:

        def write(content: bytes | memoryview) -> None:
            digest.update(content)
            opened.write(content)

        write(_header({name: tensors[name] for name in names}, about or {}))
        for name in names:
            planned, made, found = tensors[name].dtype, 0, set()
            for part in [tensors[name]] if parts is None else parts(name):
                made, found = made + part.numel(), found | {part.dtype}
                write(bits(part).numpy().data)
                del part
            if found != {planned} or made != tensors[name].numel():
                raise ValueError(
                    f"{name} is {made} of {found}, but {tensors[name].numel()} of {planned} was planned."
                )
    sync(file)
    if digest_of_file(file) != digest.hexdigest():
        raise ValueError(f"{file} does not read back as it was written; is the disk sound?")


def read_tensor(file: Path, name: str) -> Tensor:
    """Read a tensor of a file, with little memory beside its own: mapped pages count until they are let go.

    Raises:
        SafetensorError: if the file is damaged or has no such tensor.
        OSError: if it cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        shape = opened.get_slice(name).get_shape()
        lines = max(1, PART // max(1, math.prod(shape[1:])))
        if not shape or shape[0] <= lines:
            return opened.get_tensor(name).clone()
        tensor = torch.empty(shape, dtype=opened.get_slice(name)[:0].dtype)
    for start in range(0, shape[0], lines):
        with safe_open(file, framework="pt") as opened:
            tensor[start : start + lines] = opened.get_slice(name)[start : start + lines]
    return tensor


def _header(empty: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """The length of a JSON text, and the text: of each tensor the type, the shape and the place."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for name, tensor in empty.items():
        if tensor.dtype not in KINDS:
            raise ValueError(f"{name} is of {tensor.dtype}, which safetensors does not hold; convert it.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
