"""Calibration data as batches."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .errors import CalibrationError
from .statistics import Batch


def batches_of(data: Tensor | Iterable[Batch], *, window: int = 512, tokens: int = 2048) -> Sequence[Batch]:
    """Cut token ids into batches; other data is a sequence of batches already.

    Args:
        data: token ids, (t,) or (sequences, window), or batches as the model takes them.
        window: length of the sequences that ids of shape (t,) are cut into; a rest of two tokens or more is kept.
        tokens: how many tokens a batch has at most, if a sequence is not longer.

    Raises:
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
