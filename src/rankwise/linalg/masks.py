"""Which entries of a matrix to keep."""

import torch
from torch import Generator, Tensor


def largest(score: Tensor, kept: int) -> Tensor:
    """Mark the ``kept`` largest entries of a matrix, however they are spread over its rows.

    >>> import torch
    >>> largest(torch.tensor([[3, 1], [2, 4]]), 2).tolist()
    [[True, False], [False, True]]
    """
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    mask.view(-1)[score.flatten().topk(kept, sorted=False).indices] = True
    return mask


def largest_in_groups(score: Tensor, kept: int, group: int) -> Tensor:
    """Mark the ``kept`` largest of every ``group`` neighbouring entries of a row.

    Args:
        score: (m, n), n a multiple of ``group``.
        kept: of each group; 1 <= kept <= group.
        group: n asks for equally many entries in every row; 4 with kept = 2 is the 2:4 pattern.

    Raises:
        ValueError: if the groups do not fit the columns.

    >>> import torch
    >>> largest_in_groups(torch.tensor([[3, 1, 0, 2]]), 1, 2).tolist()
    [[True, False, False, True]]
    """
    check_groups(score.shape[1], kept, group)
    groups = score.view(len(score), -1, group)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(2, groups.topk(kept, dim=2).indices, True).view(score.shape)


def check_groups(columns: int, kept: int, group: int) -> None:
    """Raise unless rows of so many columns fall into groups of which so many can be kept."""
    if group < 1 or columns % group or not 1 <= kept <= group:
        raise ValueError(
            f"{kept} of every {group} entries cannot be kept in rows of {columns}: the group must divide the "
            "row, and hold what is kept."
        )


def draw_places(count: int, kept: int, generator: Generator) -> Tensor:
    """Draw ``kept`` of ``count`` places, every set being equally likely, in memory for the kept ones alone.

    >>> import torch
    >>> len(draw_places(10**12, 5, torch.Generator().manual_seed(0)))
    5
    """
    if not 1 <= kept <= count:
        raise ValueError(f"cannot draw {kept} of {count} places.")
    if 2 * kept > count:
        return torch.randperm(count, generator=generator)[:kept].sort().values
    places = torch.empty(0, dtype=torch.int64)
    while len(places) < kept:
        missing = kept - len(places)
        places = torch.cat(
            [places, torch.randint(count, (missing + missing // 8 + 8,), generator=generator)]
        ).unique()
    return places[torch.randperm(len(places), generator=generator)[:kept]].sort().values
