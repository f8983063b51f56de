"""The same share of its own size for every layer."""

from collections.abc import Mapping
from fractions import Fraction

from ..core.choices import Ladder, check_budget


def uniform(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int]:
    """Give every layer the largest choice within the budget's share of its dense size."""
    check_budget(ladders, budget)
    share = Fraction(budget, sum(int(ladder.costs[-1]) for ladder in ladders.values()))
    picks = {
        name: int((ladder.costs <= int(share * int(ladder.costs[-1]))).sum()) - 1
        for name, ladder in ladders.items()
    }
    for name, pick in picks.items():
        if pick < 0:
            raise ValueError(
                f"layer {name} has no choice of {float(share):.4f} of its size; keep more, leave the layer out "
                "with 'where', or allocate otherwise, such as by 'greedy'."
            )
    return picks
