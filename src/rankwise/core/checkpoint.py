"""Nested dictionaries and lists of tensors and JSON values, in one file that appears whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .files import named
from .tensor_file import write_tensors

FORMAT = 1


def save_tree(tree: Any, path: Path) -> None:
    """Write a tree of dictionaries, lists, tensors, numbers, strings and None; tensors are kept bit by bit.

    One tensor at a time is copied.

    Raises:
        OSError: if the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps({"format": FORMAT, "tree": _packed(tree, tensors)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            write_tensors(temporary, tensors, about={"rankwise": header})
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tree(path: Path, *, tensors: bool = True) -> Any:
    """Read what :func:`save_tree` wrote.

    Args:
        path: the file.
        tensors: whether to read them; else each is None.

    Raises:
        ValueError: if the file is damaged or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["rankwise"])
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']}, not {FORMAT}")
            return _unpacked(
                header["tree"],
                lambda key: file.get_tensor(key).clone() if tensors else None,  # aligned, for equal sums
            )
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint or is damaged ({error}); remove it to start anew.") from error


def _packed(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        tensors[key] = tree.detach()
        return {"tensor": key}
    if isinstance(tree, dict):
        return {"pairs": [[key, _packed(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [_packed(value, tensors) for value in tree]
    return tree


def _unpacked(tree: Any, tensor: Any) -> Any:
    if isinstance(tree, list):
        return [_unpacked(value, tensor) for value in tree]
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensor(tree["tensor"])
        return {key: _unpacked(value, tensor) for key, value in tree["pairs"]}
    return tree
