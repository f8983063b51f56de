"""Files of safetensors that are written one tensor at a time."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
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


def write_tensors(file: Path, empty: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
    """Write tensors into a file, one after the other, and check that they read back the same.

    Args:
        file: to be made.
        empty: of each name a tensor of the shape and type that its value will have; the meta device will do.
        value: makes the tensor of a name; it is let go before the next is made.

    Raises:
        ValueError: if a value has another shape or type, or does not read back.
        OSError: if the disk is full.
    """
    names = sorted(empty, key=lambda name: (-empty[name].element_size(), name))  # so that all are aligned
    digests = {}
    with file.open("wb") as opened:
        opened.write(_header({name: empty[name] for name in names}))
        for name in names:
            tensor = value(name)
            if tensor.dtype != empty[name].dtype or tensor.shape != empty[name].shape:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but {empty[name].dtype} "
                    f"{tuple(empty[name].shape)} was planned."
                )
            content = _bytes(tensor)
            digests[name] = hashlib.blake2b(content).digest()
            opened.write(content)
            del tensor, content
    sync(file)
    with safe_open(file, framework="pt") as opened:
        for name, digest in digests.items():
            if hashlib.blake2b(_bytes(opened.get_tensor(name))).digest() != digest:
                raise ValueError(f"{name} in {file} does not read back as it was written; is the disk sound?")


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
