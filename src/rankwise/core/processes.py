"""Which of several processes this one is, and whether all have the same."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether more than one process trains."""
    return dist.is_initialized() and dist.get_world_size() > 1


def leads() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def of_first(*tensors: Tensor) -> list[Tensor]:
    """Return tensors as the first of several processes has them; decompositions may differ in signs.

    Args:
        tensors: of the same shapes, types and kind of device in all.
    """
    found = [tensor.contiguous() for tensor in tensors]
    if several():
        for tensor in found:
            dist.broadcast(tensor, 0)
    return found


def compare(mine: Any, what: str, group: Any = None) -> None:
    """Raise in all processes unless all have the same.

    Args:
        mine: what this one has; can be pickled.
        what: to call it by.
        group: of processes; None is all.

    Raises:
        ValueError: if there is another one.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    if any(each != found[0] for each in found):
        raise ValueError(f"processes have different {what}; build and load the same in all of them.")
