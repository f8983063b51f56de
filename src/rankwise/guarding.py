"""The look at adapters that a training run takes by itself."""

import warnings

import torch
from torch import nn

from .checking import ENOUGH, check_adapters
from .core.following import Follower
from .core.report import Report


class Guard:
    """Looks once, when some steps were taken, whether adapters train; see :func:`rankwise.check_adapters`.

    Steps at a learning rate of zero do not count.

    Args:
        model: that trains.
        optimizer: trains it.
        follower: of both, or None if there are no adapters.
        steps: that there will be.

    Attributes:
        report: what was seen, or None.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, follower: Follower | None, steps: int
    ) -> None:
        self.model, self.optimizer, self.follower = model, optimizer, follower
        self.steps = steps
        self.report: Report | None = None

    def __call__(self) -> None:
        """Look, if it is time and has not been done; warn of layers that do not train.

        Raises:
            ValueError: if no layer trains.
        """
        if self.report is not None or self.follower is None:
            return
        if self.follower.moved < ENOUGH and self.follower.done < self.steps:
            return
        self.report = check_adapters(self.model, self.optimizer, follower=self.follower)
        if all(row["problem"] or row["name"] in self.report.totals["unreached"] for row in self.report.rows):
            raise ValueError(f"no adapter trains: {self.report.title}.")
        if self.report.totals["problems"]:
            warnings.warn(f"{self.report.title}.", RuntimeWarning, stacklevel=2)
