"""Files of safetensors that are written some numbers at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import sync

KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: Path, empty: Mapping[str, Tensor], parts: Callable[[str], Iterable[Tensor]]) -> None:
    """Write tensors into a file, part after part, and check that they read back the same.

    Args:
        file: to be made.
        empty: of each name a tensor of the shape and type that its value will have; the meta device will do.
        parts: makes the tensor of a name, or consecutive parts of it; nothing of a tensor is held when the next
            is made.

    Raises:
        ValueError: if the parts have another type or together another size, or do not read back.
        OSError: if the disk is full.
    """
    names = sorted(empty, key=lambda name: (-empty[name].element_size(), name))  # so that all are aligned
    digest = hashlib.blake2b()
    with file.open("wb") as opened:

        def write(content: bytes | memoryview) -> None:
            digest.update(content)
            opened.write(content)

        write(_header({name: empty[name] for name in names}))
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


def _header(empty: Mapping[str, Tensor]) -> bytes:
    """The length of a JSON text, and the text: of each tensor the type, the shape and the place."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in empty.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
