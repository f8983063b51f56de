"""Which of several processes this one is."""

import torch.distributed as dist


def several() -> bool:
    """Whether more than one process trains."""
    return dist.is_initialized() and dist.get_world_size() > 1


def leads() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0
