"""Whole shares of a whole."""

import math
from collections.abc import Sequence


def shared(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Split a count: 1 for each, and the rest in proportion to weights, at most ``most`` each in all.

    What one cannot take goes to the others in proportion; where no weight is left, room is the weight.

    Args:
        total: from ``len(most)`` to ``sum(most)``; what is outside is brought to the nearer end.
        weights: at least zero, finite.
        most: at least one each.

    >>> shared(10, [1.0, 1.0, 2.0], [100, 100, 100]), shared(10, [8.0, 1.0, 1.0], [4, 100, 100])
    ([3, 3, 4], [4, 3, 3])
    """
    room = [each - 1 for each in most]
    left = min(max(total - len(most), 0), sum(room))
    exact = _proportions(left, weights, room)
    counts = [math.floor(part) for part in exact]
    order = sorted(range(len(most)), key=lambda i: (counts[i] - exact[i], i))  # the largest rests first
    for i in [i for i in order if counts[i] < room[i]][: left - sum(counts)]:
        counts[i] += 1
    return [count + 1 for count in counts]


def _proportions(total: int, weights: Sequence[float], room: Sequence[int]) -> list[float]:
    """The same with real numbers and from zero."""
    found, free, left = [0.0] * len(room), set(range(len(room))), float(total)
    while free:
        own = {i: weights[i] for i in free}
        if not any(own.values()):
            own = {i: float(room[i]) for i in free}
        whole = sum(own.values()) or 1.0
        full = {i for i in free if left * (own[i] / whole) >= room[i]}
        if not full:
            for i in free:
                found[i] = left * (own[i] / whole)
            return found
        for i in full:
            found[i] = float(room[i])
        left = max(0.0, left - sum(room[i] for i in full))
        free -= full
    return found
