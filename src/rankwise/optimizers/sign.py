"""Signs of gradients."""

from dataclasses import dataclass

from torch import Tensor

from ..core.states import State
from ..core.transforms import Transform


@dataclass(frozen=True)
class Sign(Transform):
    """Keep nothing of a gradient but its signs; of an exact zero, zero."""

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, ...)."""
        return grad.sign()

    @property
    def elementwise(self) -> bool:
        """It is."""
        return True


def sign() -> Transform:
    """signSGD: all entries move by the same length. There is no state.

    >>> import torch
    >>> sign().update(torch.tensor([[2.0, -0.1, 0.0]]), {}, torch.zeros(1, 3)).tolist()
    [[1.0, -1.0, 0.0]]

    References: Bernstein et al., 2018, arXiv 1802.04434.
    """
    return Sign()
