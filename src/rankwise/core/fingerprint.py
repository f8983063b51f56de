"""A content hash of a model, so that figures about one model are never used for another."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .bits import bits


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the names, shapes, types and bytes of all parameters and persistent buffers.

    >>> from torch import nn
    >>> layer = nn.Linear(2, 2)
    >>> fingerprint(layer) == fingerprint(layer), fingerprint(layer) == fingerprint(nn.Linear(2, 2))
    (True, False)
    """
    return digest_of(model.state_dict())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, shapes, types and bytes of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bits(tensor).numpy().data)
    return digest.hexdigest()


def values_digest(tensors: Mapping[str, Tensor], numbers: int = 2**18) -> str:
    """Return a hash of the names, shapes and values of tensors, the same in all types no wider than float32.

    Args:
        tensors: by name; floating-point numbers count by their values, others by their bytes.
        numbers: how many are converted at a time, but for a row that is longer; the hash does not depend on it.

    >>> import torch
    >>> values_digest({"a": torch.eye(2)}) == values_digest({"a": torch.eye(2, dtype=torch.bfloat16)})
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        each = max(1, numbers // max(1, tensor[:1].numel() if tensor.ndim else 1))
        for part in tensor.detach().reshape(tensor.shape or (1,)).split(each):
            digest.update(part.to("cpu", wide).contiguous().numpy().data)
    return digest.hexdigest()
