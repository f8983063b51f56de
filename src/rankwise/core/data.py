"""Calibration data as batches."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from .bits import bits
from .errors import CalibrationError
from .statistics import Batch


def batches_of(data: Tensor | Iterable[Batch], *, window: int = 512, tokens: int = 2048) -> Sequence[Batch]:
    """Cut token ids into batches; other data is a sequence of batches already.

    Args:
        data: token ids, (t,) or (sequences, window), or batches as the model takes them.
        window: length of the sequences that ids of shape (t,) are cut into; a rest of two tokens or more is kept.
        tokens: how many tokens a batch has at most, if a sequence is not longer.

    Raises:
        TypeError: if a tensor holds no token ids.
        ValueError: if the window is too short.
        CalibrationError: if there is nothing in it.
    """
    if not isinstance(data, Tensor):
        batches = list(data)
        if not batches:
            raise CalibrationError("the calibration data is empty; give at least one batch.")
        return batches
    if data.is_floating_point() or data.dim() not in (1, 2):
        raise TypeError(
            f"a calibration tensor holds token ids, (t,) or (b, t), got {data.dtype} {tuple(data.shape)}; "
            "put other inputs in a list of batches."
        )
    if window < 2:
        raise ValueError(f"window must be >= 2, got {window}.")
    if data.numel() == 0:
        raise CalibrationError("the calibration text is empty; give at least a few tokens.")
    sequences = [data] if data.dim() == 1 else list(data)
    pieces = [
        piece
        for sequence in sequences
        for piece in sequence.split(window)
        if len(piece) > 1 or len(sequence) == 1
    ]
    done: list[Batch] = []
    run: list[Tensor] = []
    for piece in pieces:
        if run and (len(piece) != len(run[0]) or len(piece) * (len(run) + 1) > tokens):
            done.append(torch.stack(run))
            run = []
        run.append(piece)
    return [*done, torch.stack(run)]


def check_held_out(held_out: float | Sequence[Batch]) -> None:
    """Raise unless what is to be kept aside is a share of the data, or batches."""
    if not isinstance(held_out, (Sequence, float, int)):
        raise TypeError(f"held_out must be a number or a sequence of batches, got a {type(held_out).__name__}.")
    if not isinstance(held_out, Sequence) and not 0 < held_out < 1:
        raise ValueError(f"held_out must be > 0 and < 1, or batches, got {held_out}.")
    if isinstance(held_out, Sequence) and not held_out:
        raise ValueError("held_out is empty; give at least one batch to judge by, or a share of the data.")


def parted(
    batches: Sequence[Batch], share: float, seed: int, *, most: int | None = None
) -> tuple[list[Batch], list[Batch]]:
    """Keep a share of the batches aside, at least one, chosen at random; returns the rest and them.

    Args:
        batches: at least two.
        share: in (0, 1).
        seed: of the choice.
        most: the most batches that are kept aside.

    Raises:
        CalibrationError: if there are fewer than two.
    """
    if len(batches) < 2:
        raise CalibrationError(
            "training needs two batches or more, one of them to judge by; give more data, or a shorter window."
        )
    order = torch.randperm(len(batches), generator=Generator().manual_seed(seed)).tolist()
    count = min(max(round(share * len(batches)), 1), len(batches) - 1, most or len(batches))
    aside = set(order[:count])
    parts = [batch for i, batch in enumerate(batches) if i not in aside]
    return parts, [batches[i] for i in sorted(aside)]


def digest_of_batches(batches: Sequence[Batch]) -> str:
    """Return a hash of all that batches hold."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(bits(value).numpy().data)
        elif isinstance(value, Mapping):
            add([part for item in value.items() for part in item])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} parts".encode())
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(list(batches))
    return digest.hexdigest()
