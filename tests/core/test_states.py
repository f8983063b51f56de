"""What a report or a checkpoint says about a method: enough to tell another one, and always something."""

import functools
import json

import pytest
import torch

from rankwise.core.states import described, told
from rankwise.preconditioners import MFac, Sngd

SHARE = 0.5


def falling(step: int, start: float = 0.1) -> float:
    return start * 0.9**step


class Falling:
    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: int) -> float:
        return falling(step, self.start)

    def at(self, step: int) -> float:
        return self(step)


def within(start: float):
    return lambda step: start * 0.9**step


SCHEDULES = [
    0.1,
    falling,
    functools.partial(falling, start=0.2),
    functools.partial(falling, start=0.3),
    Falling(0.1),
    Falling(0.2),
    Falling(0.1).at,
    lambda step: 0.1,
    lambda step: 0.2,
    lambda step: 0.2 if step in {"a", "b", "c"} else SHARE,
    lambda step, start=0.1: start,
    lambda step, start=0.2: start,
    within(0.1),
    within(0.2),
]


def test_other_schedules_are_described_otherwise():
    texts = [json.dumps(described(Sngd(damping=each))) for each in SCHEDULES]
    assert len({*texts}) == len(SCHEDULES)


def test_a_schedule_that_is_made_again_is_the_same():
    assert described(within(0.1)) == described(within(0.1))
    assert described(Falling(0.1)) == described(Falling(0.1))


def test_what_a_lambda_uses_from_around_it_counts(monkeypatch: pytest.MonkeyPatch):
    schedule = SCHEDULES[9]
    before = described(schedule)
    monkeypatch.setitem(globals(), "SHARE", 0.25)
    assert described(schedule) != before


def test_types():
    found = described(MFac(storage=torch.bfloat16))
    assert found["storage"] == "torch.bfloat16"
    json.dumps(found)


def test_given_functions_are_told_apart_by_what_they_compute():
    """Also where they hold what is no plain data, of which the name must do, and never an address."""

    def around(value: object):
        return lambda step: (value, step)

    class Holds:
        def __init__(self) -> None:
            self.model = torch.nn.Linear(2, 2)

        def loss(self, step: int) -> int:
            return step

    assert told(around(1)) == told(around(1)) != told(around(2))
    for make in (
        lambda: Holds().loss,
        lambda: around(torch.ones(2)),
        lambda: torch.nn.Linear(2, 2),
        lambda: Falling(torch.ones(2)),  # pyright: ignore[reportArgumentType]
    ):
        assert told(make()) == told(make())
        assert " at 0x" not in json.dumps(told(make()))
    assert told(SCHEDULES[2]) != told(SCHEDULES[3])


def test_what_says_nothing_is_refused():
    with pytest.raises(ValueError, match="reports and checkpoints can say what they are"):
        described(Falling(torch.zeros(3)))  # pyright: ignore[reportArgumentType]
