"""Files of safetensors that are written some numbers at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import sync

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
    empty: Mapping[str, Tensor],
    parts: Callable[[str], Iterable[Tensor]],
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write tensors into a file, part after part, and check that they read back the same.

    Args:
        file: to be made.
        empty: of each name a tensor of the shape and type that its value will have; the meta device will do. They
            are written in this order, wider types first.
        parts: makes the tensor of a name, or consecutive parts of it; nothing of a tensor is held when the next
            is made.
        about: texts that stand in the header.

    Raises:
        ValueError: if safetensors has no such type, the parts have another type or together another size, or
            they do not read back.
        OSError: if the disk is full.
    """
    names = sorted(empty, key=lambda name: -empty[name].element_size())  # so that all are aligned
    digest = hashlib.blake2b()
    with file.open("wb") as opened:

        def write(content: bytes | memoryview) -> None:
            digest.update(content)
            opened.write(content)

        write(_header({name: empty[name] for name in names}, about or {}))
        for name in names:
            planned, made, found = empty[name].dtype, 0, set()
            for part in parts(name):
                made, found = made + part.numel(), found | {part.dtype}
                write(_bytes(part))
                del part
            if found != {planned} or made != empty[name].numel():
                raise ValueError(
                    f"{name} is {made} of {found}, but {empty[name].numel()} of {planned} was planned."
                )
    sync(file)
    if _digest(file) != digest.digest():
        raise ValueError(f"{file} does not read back as it was written; is the disk sound?")


def _digest(file: Path) -> bytes:
    """Hash a file without mapping it, as mapped pages count as memory."""
    digest, block = hashlib.blake2b(), bytearray(2**20)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.digest()


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


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
