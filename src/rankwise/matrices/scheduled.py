"""The part of an adapter that changes by a schedule while it trains."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .base import StructuredMatrix
from .wrapper import Wrapper


class Scheduled(Wrapper):
    """A trained matrix that something must act on around each optimiser step; it refuses to train without.

    In training mode with gradients it raises until :func:`rankwise.follow` follows it. A copy is not followed.

    Args:
        matrix: (m, n), of any kind.
        schedule: what acts, as plain data: ``kind``, a name from :mod:`rankwise.schedules`, and its fields.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> matrix = Scheduled(Dense(torch.eye(2)), {"kind": "FreezeColumns", "until": 0.3})
    >>> matrix(torch.ones(2))
    Traceback (most recent call last):
    RuntimeError: this adapter trains by a schedule (FreezeColumns) that nothing follows: call ...
    >>> matrix.eval()(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    def __init__(self, matrix: StructuredMatrix, schedule: Mapping[str, Any]) -> None:
        super().__init__(matrix)
        if not _is_plain(schedule):
            raise ValueError(
                f"schedule must map 'kind' and the names of fields to plain values, got {schedule!r}."
            )
        self.schedule = dict(schedule)
        self.followed = False
        self.acted = 0  # around how many steps, since it was made or copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "followed": False, "acted": 0}

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        self._refuse()
        return self.matrix(x)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m)."""
        self._refuse()
        return self.matrix.lookup(index)

    def _refuse(self) -> None:
        """Raise if it would train with nothing that follows it."""
        if self.training and not self.followed and torch.is_grad_enabled() and self._trains():
            raise RuntimeError(
                f"this adapter trains by a schedule ({self.schedule['kind']}) that nothing follows: call "
                "rankwise.follow(model, optimizer, steps=...) first, or model.eval() to only use it."
            )

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.matrix.parameters())

    def spec(self) -> dict[str, Any]:
        """Kind, schedule, and the spec of the matrix."""
        return {**super().spec(), "schedule": dict(self.schedule)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same around a matrix that is not initialised."""
        from . import from_spec

        return cls(from_spec(spec.get("matrix"), **where), spec.get("schedule", {}))


def _is_plain(schedule: Any) -> bool:
    """Whether this is JSON data of one level that has a kind."""
    if not isinstance(schedule, Mapping) or not isinstance(schedule.get("kind"), str):
        return False
    values = schedule.values()
    numbers = all(math.isfinite(value) for value in values if isinstance(value, (int, float)))
    return numbers and all(value is None or isinstance(value, (str, int, float)) for value in values)
