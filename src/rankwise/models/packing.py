"""Examples put together into batches, so that little of a batch is padding."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator

from ..core.labels import UNLABELLED
from ..core.statistics import Batch
from .causal import LENGTH, evaluating, positions_of
from .examples import Example

Row = list[Example]


def packed(
    examples: Sequence[Example],
    window: int,
    *,
    rows: int = 4,
    seed: int | None = None,
    name: str = "the data",
    alone: bool = False,
) -> list[dict[str, Any]]:
    """Fill windows with examples and put windows together into batches.

    Positions begin anew with each example, from which many models of transformers make the mask of the attention,
    so that examples of one window do not see each other; :func:`keeps_apart` says whether a model does so. Texts
    that are longer than a window become several examples; of an example with a prompt what is too long is cut
    off, with a warning.

    Args:
        examples: at least one.
        window: most tokens of a row.
        rows: most rows of a batch.
        seed: of the order of the examples; None keeps theirs.
        name: what warnings and errors call the examples.
        alone: give each example a row of its own, for models that do not keep them apart.

    Returns:
        mappings of ``input_ids``, ``position_ids`` (not if ``alone``) and ``labels``, each (b, t) with
        t <= window, and of ``use_cache``.

    Raises:
        ValueError: if an argument is out of range, or nothing to learn is left.
    """
    if window < 2:
        raise ValueError(f"window must be >= 2 tokens, one to condition on and one to learn, got {window}.")
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}.")
    pieces = [piece for example in examples for piece in _fitted(example, window)]
    learned = [piece for piece in pieces if any(piece.counts[1:])]
    long = sum(len(example.ids) > window and not example.whole for example in examples)
    if not learned:
        raise ValueError(f"{name} has nothing to learn within {window} tokens; give a longer window.")
    if long:
        warnings.warn(
            f"{long} of {len(examples)} examples of {name} are longer than the window of {window} tokens and "
            "were cut off; give a longer window.",
            stacklevel=2,
        )
    if seed is not None:
        order = torch.randperm(len(learned), generator=Generator().manual_seed(seed)).tolist()
        learned = [learned[i] for i in order]
    filled = [[piece] for piece in learned] if alone else _filled(learned, window)
    batches = [_batch(filled[low : low + rows]) for low in range(0, len(filled), rows)]
    if alone:  # positions count as always, and some models take none
        return [{key: value for key, value in batch.items() if key != "position_ids"} for batch in batches]
    return batches


def keeps_apart(model: Any) -> bool:
    """Whether a causal language model of transformers keeps the examples of a window apart.

    That is found out by running it on windows of two texts: other first texts must not change the logits of the
    second ones, but for rounding.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    config = model.config.get_text_config()
    size = min(LENGTH, (positions_of(model) or 2 * LENGTH) // 2)
    one, other, second = torch.randint(config.vocab_size, (3, 2, size), generator=Generator().manual_seed(0))
    inputs = {"position_ids": torch.arange(size).repeat(2, 2).to(model.device), "use_cache": False}
    with evaluating(model):
        windows = [torch.cat([first, second], 1).to(model.device) for first in (one, other)]
        found, changed = (model(input_ids=ids, **inputs).logits[:, size:].float() for ids in windows)
    rounding = max(1e-5, torch.finfo(model.dtype).eps / 4)
    return bool((changed - found).norm() <= rounding * found.norm())


def unlabelled(batches: Sequence[Batch], tokens: int) -> list[dict[str, Any]]:
    """Take what a model is given of the first batches, until there are so many tokens."""
    taken, count = [], 0
    for batch in batches:
        if count >= tokens:
            break
        assert isinstance(batch, dict)
        taken.append({key: value for key, value in batch.items() if key != "labels"})
        count += batch["input_ids"].numel()
    return taken


def _fitted(example: Example, window: int) -> list[Example]:
    """Cut what is longer than a window."""
    ends = range(0, len(example.ids), window) if example.whole else (0,)
    return [Example(example.ids[low : low + window], example.counts[low : low + window]) for low in ends]


def _filled(pieces: Sequence[Example], window: int) -> list[Row]:
    """Put each piece into the first of the last few windows that has room."""
    filled: list[tuple[Row, int]] = []
    for piece in pieces:
        size = len(piece.ids)
        for i in range(max(0, len(filled) - 16), len(filled)):
            row, used = filled[i]
            if used + size <= window:
                filled[i] = [*row, piece], used + size
                break
        else:
            filled.append(([piece], size))
    return [row for row, _ in filled]


def _batch(rows: Sequence[Row]) -> dict[str, Any]:
    """Make a batch of windows; padding is one more text in a row, of which nothing is learned."""
    length = max(sum(len(piece.ids) for piece in row) for row in rows)
    shape = len(rows), length
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, UNLABELLED)
    for i, row in enumerate(rows):
        low = 0
        for piece in row:
            high = low + len(piece.ids)
            ids[i, low:high] = torch.tensor(piece.ids)
            positions[i, low:high] = torch.arange(high - low)
            counts = torch.tensor(piece.counts)
            counts[0] = False  # nothing before it says what it is
            labels[i, low:high] = torch.where(counts, ids[i, low:high], UNLABELLED)
            low = high
        positions[i, low:] = torch.arange(length - low)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
