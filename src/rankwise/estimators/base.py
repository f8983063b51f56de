"""What an estimator of gradients is."""

import abc
import math
from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor

from .network import Network

Draw = Callable[[int, int, Generator], Tensor]
"""(rows, columns, generator) -> a random matrix whose entries have a mean square of one."""


class Estimator(abc.ABC):
    """Writes gradients that are not those of back-propagation; a frozen dataclass.

    Random matrices are drawn anew from a seed each time they are used, so there is no state. While no backward
    pass runs, the model is as it was.
    """

    @abc.abstractmethod
    def backward(self, network: Network, inputs: Any, labels: Tensor) -> Tensor:
        """Add to the gradients of the trained parameters; returns the loss, detached."""


def check_gain(gain: float) -> None:
    """Raise ValueError unless it is a finite number > 0."""
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be a finite number > 0, got {gain}.")
