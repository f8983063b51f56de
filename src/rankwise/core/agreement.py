"""Whether processes that share their work have the same gradients."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .exchange import Exchange

ALIKE = 1e-3  # share by which norms of equal gradients may differ between unequal machines
NONE = -1.0  # stands for the norm of no gradient


def agreed(
    exchange: Exchange, gradients: Mapping[str, Tensor], names: Sequence[str], steps: int, *, sound: bool
) -> dict[str, float]:
    """Return the norms of gradients, infinite where one is not finite on any process; all if one is not sound.

    So all processes take a step or pass over it, and none waits for what another does not say.

    Args:
        exchange: with the others.
        gradients: those that there are, averaged.
        names: of all layers.
        steps: taken before.
        sound: whether all other gradients of this process are finite.

    Raises:
        ValueError: if processes have other gradients, or have taken other numbers of steps.
    """
    sizes = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients.values()]
    norms = torch.stack(sizes).nan_to_num(torch.inf, torch.inf) if sizes else torch.zeros(0)
    if exchange.size == 1:
        return {name: norm if sound else torch.inf for name, norm in zip(gradients, norms.tolist(), strict=True)}
    own = torch.full((len(names) + 2,), NONE, dtype=torch.float64, device=exchange.device)
    own[[i for i, name in enumerate(names) if name in gradients]] = norms.to(own)
    own[-2], own[-1] = float(not sound), steps
    with exchange.traffic.phase("agree"):
        (*lows, _, least), (*highs, unsound, most) = (each.tolist() for each in exchange.extremes("agree", own))
    if least != most:
        raise ValueError("processes have taken other numbers of steps; load the same state on all of them.")
    for name, low, high in zip(names, lows, highs, strict=True):
        if high < float("inf") and high - low > ALIKE * abs(high):
            raise ValueError(
                f"processes have other gradients of layer {name}; average them before this step, as "
                "DistributedDataParallel does."
            )
    found = {name: high for name, high in zip(names, highs, strict=True) if name in gradients}
    return dict.fromkeys(found, torch.inf) if unsound else found
