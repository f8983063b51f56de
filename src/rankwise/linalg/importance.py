"""Draw some of many vectors in proportion to their squared lengths."""

import torch
from torch import Generator, Tensor


def draw_important(squares: Tensor, count: int, generator: Generator, *, replacement: bool) -> Tensor:
    """Draw indices with chances proportional to given squares.

    Args:
        squares: (n,), >= 0.
        count: without replacement at most as many as there are positive squares.
        generator: draws.
        replacement: whether an index may come twice.

    Returns:
        (count,), or none if all squares are zero.
    """
    largest = squares.max() if len(squares) else squares.new_zeros(())
    if not largest > 0:
        return torch.empty(0, dtype=torch.long, device=squares.device)
    return torch.multinomial(squares / largest, count, replacement=replacement, generator=generator)


def importance_scales(squares: Tensor, rows: Tensor) -> Tensor:
    """Return 1 / sqrt(r p_k) for r rows drawn with replacement: so scaled, their outer products are unbiased.

    The sum of u_k u_k' / (r p_k) over the draws has the expectation sum_k u_k u_k' over all rows.

    >>> importance_scales(torch.tensor([1.0, 15.0]), torch.tensor([0, 0, 0, 0])).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    return (squares.sum() / (len(rows) * squares[rows])).sqrt()
