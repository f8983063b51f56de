"""Models inside of what others wrap around them."""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: Any) -> nn.Module:
    """Return the model inside of ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``.

    What they add would stand in front of all names, by which files are read.
    """
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
