"""An odd polynomial that keeps all singular values below a limit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import State, counter, per_parameter
from ..core.transforms import Transform
from ..linalg import odd_polynomials, spectral_bound
from .constraint import Limited, of_matrices, unit

REACH = 81 / 62
"""How far above the limit values may be: 1 / h(1 / 3), see cap_strength."""


@dataclass(frozen=True, kw_only=True)
class SoftCap(Limited):
    """Take singular values s to p(s) + a p(s)^3, p(s) = s - a s^3, with a so that the largest goes to ``limit``.

    Args:
        limit: of the norm from root mean square to root mean square.
        step: the largest norm of directions, if it is known: then a follows from the limit, lr, weight decay
            and the longest step, as in the paper, which holds as long as nothing else makes weights larger. None
            measures the norm from above at each step instead.
    """

    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not self.step > 0:
            raise ValueError(f"step must be > 0, or None, got {self.step}.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """How many steps there were: before the first, nothing is known of a weight."""
        return {} if self.step is None else {"step": counter(index)}

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """(k, m, n) -> (k, m, n), with norms up to ``limit``."""
        values = param / unit(param)
        size = self._size(values, state, lr, weight_decay).view(-1, 1, 1)
        values = values * (REACH * self.limit / size).clamp_max(1)  # almost never below one
        size = size.clamp(self.limit, REACH * self.limit)  # from below: no cap is needed, and a is zero
        a = cap_strength(self.limit / size) / size.square()
        return odd_polynomials(values, [(1.0, -a, 0.0), (1.0, a, 0.0)]) * unit(param)

    def _size(self, values: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """Bound the norms, (k,)."""
        if self.step is None:
            return spectral_bound(values)
        longest = values.new_full((len(values),), self.limit * abs(1 - lr * weight_decay) + lr * self.step)
        first = [step == 1 for step in state["step"].add_(1).tolist()]
        if not any(first):
            return longest
        return torch.where(per_parameter(first, longest) > 0, spectral_bound(values), longest)


def cap_strength(ratio: Tensor) -> Tensor:
    """Return t = a k^2 so that the soft cap takes k to ``ratio`` k, for ratios from 62 / 81 to 1.

    p(k) + a p(k)^3 = k h(t) with h(t) = 1 - t + t (1 - t)^3, which falls from 1 to 62 / 81 on [0, 1 / 3]. Up to
    there the cap rises on all of [0, k], so nothing below k ends above ``ratio`` k.

    >>> cap_strength(torch.tensor([1.0, 62 / 81], dtype=torch.float64))
    tensor([0.0000, 0.3333], dtype=torch.float64)
    """
    t = ((1 - ratio) * (9 / 19)).sqrt()  # h(t) <= 1 - 3 t^2 (1 - 1/3 + 1/27), so the root is not above
    for _ in range(5):  # h is concave: Newton's steps come from above and never pass the root
        left = 1 - t
        value, slope = 1 - t + t * left**3, left.square() * (1 - 4 * t) - 1
        t = t - torch.where(slope < 0, (value - ratio) / slope, 0.0)
    return t.clamp(0, 1 / 3)


def soft_cap(*, limit: float, step: float | None = None) -> Transform:
    """Keep the norms of all matrices below a limit by a polynomial that hardly changes what is far below it.

    To stand behind another transform, ``chain(adam(), soft_cap(limit=2.0))``; alone it is gradient descent with
    a cap. Where a step takes norms further than 1.3 times the limit, and at the first step, a weight is shrunk
    first.

    >>> soft_cap(limit=2.0).matrix
    SoftCap(limit=2.0, step=None)

    Args:
        limit: of the norm from root mean square to root mean square, sqrt(n / m) times the largest singular
            value.
        step: the largest norm of directions, where it is known, as for :func:`lipschitz`; else it is measured.

    References: Newhouse et al., "Training transformers with enforced Lipschitz constants", 2025, arXiv
        2507.13338. Their code sets a = 1 where no cap is needed; here a = 0.
    """
    return of_matrices(SoftCap(limit=limit, step=step))
