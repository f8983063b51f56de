"""Budgets as shares of a whole."""

import random

from rankwise.core.choices import budget_of


def test_a_budget_is_the_most_whose_share_is_at_most_what_is_kept():
    draw = random.Random(0)
    for _ in range(10_000):
        whole = draw.randint(1, 10 ** draw.randint(1, 13))
        keep = draw.random()
        most = budget_of(keep, whole)
        assert most / whole <= keep < (most + 1) / whole
        assert budget_of(most / whole, whole) == most
