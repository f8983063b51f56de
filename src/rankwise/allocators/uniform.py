"""The same share of its own size for every layer."""

from collections.abc import Mapping
from fractions import Fraction

from ..core.choices import Ladder, check_budget


def uniform(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Give every layer the largest choice within the budget's share of its dense size.

    A layer whose cheapest choice is above that, such as a head of two classes, gets it; the others have the same
    share of what is left.
    """
    check_budget(ladders, budget)
    picks, rest = dict.fromkeys(ladders, 0), dict(ladders)
    while True:
        share = Fraction(budget, sum(int(ladder.costs[-1]) for ladder in rest.values()))
        within = {
            n: int((ladder.costs <= int(share * int(ladder.costs[-1]))).sum()) for n, ladder in rest.items()
        }
        short = [name for name, count in within.items() if not count]
        if not short:
            return picks | {name: count - 1 for name, count in within.items()}
        budget -= sum(int(rest.pop(name).costs[0]) for name in short)
