"""Figures of a run for TensorBoard."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .running import Observe


@contextmanager
def tensorboard(folder: str | Path) -> Iterator[Observe]:
    """Give a function that writes figures into a folder that TensorBoard reads.

    Raises:
        ValueError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("TensorBoard is not installed: pip install tensorboard, or leave it out.") from error

    with SummaryWriter(str(folder)) as writer:

        def observe(step: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

        yield observe
