"""A sparse matrix that a kernel makes of two thin ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..linalg import distance, hard, inner, magnitude, smallest_kept, soft
from .base import StructuredMatrix, size, without_autocast

Kernel = Callable[[Tensor, Tensor], Tensor]  # (h, m, w) and (h, n, w) -> (h, m, n)
Shrink = Callable[[Tensor, Tensor], Tensor]  # a matrix and a threshold -> the matrix with few entries
KERNELS: Mapping[str, Kernel] = {"distance": distance, "inner": inner}
SHRINKS: Mapping[str, Shrink] = {"hard": hard, "magnitude": magnitude, "soft": soft}


class Kernelled(StructuredMatrix):
    """The largest entries of K, where K_ij = sum_h c_h k(p_hi, q_hj) of points p (h, m, w) and q (h, n, w).

    With ``mixing`` (a, g, b) it is K + a softmax(K / g) + b, the softmax over rows. A share ``density`` of the
    entries is left, chosen by absolute value each time; the attribute may be set at any time. All is computed in
    float32 or wider, also under autocast. The matrix is written out for every product: put a
    :class:`Recomputed` around it for training.

    Args:
        outputs: p, (h, m, w).
        inputs: q, (h, n, w).
        weights: c, one number a head; not trained.
        kernel: ``distance`` or ``inner`` of :mod:`rankwise.linalg`.
        shrink: how entries are left: ``soft``, ``hard`` or ``magnitude`` of :mod:`rankwise.linalg`. What ``soft``
            takes off is the largest entry that is left out.
        density: in (0, 1].
        mixing: (3,), or None.

    >>> import torch
    >>> points = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [1.0]]])
    >>> Kernelled(*points, [1.0], kernel=inner, shrink=hard, density=0.5).dense().tolist()
    [[3.0, 0.0], [6.0, 0.0]]
    """

    def __init__(
        self,
        outputs: Tensor,
        inputs: Tensor,
        weights: Sequence[float],
        *,
        kernel: Kernel,
        shrink: Shrink,
        density: float,
        mixing: Tensor | None = None,
    ) -> None:
        super().__init__()
        if outputs.dim() != 3 or inputs.dim() != 3 or outputs.shape[::2] != inputs.shape[::2]:
            raise ValueError(
                f"outputs (h, m, w) and inputs (h, n, w) disagree: {tuple(outputs.shape)}, {tuple(inputs.shape)}."
            )
        if len(weights) != len(outputs) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be {len(outputs)} finite numbers, got {weights!r}.")
        if mixing is not None and mixing.shape != (3,):
            raise ValueError(f"mixing must have shape (3,), got {tuple(mixing.shape)}.")
        if kernel not in KERNELS.values() or shrink not in SHRINKS.values():
            raise ValueError(f"kernel is one of {', '.join(KERNELS)}, and shrink of {', '.join(SHRINKS)}.")
        self.outputs, self.inputs = nn.Parameter(outputs), nn.Parameter(inputs)
        self.mixing = None if mixing is None else nn.Parameter(mixing)
        self.weights, self.kernel, self.shrink = tuple(map(float, weights)), kernel, shrink
        self.shape = (outputs.shape[1], inputs.shape[1])
        self.density = density

    @property
    def density(self) -> float:
        """Share of the entries that are left."""
        return self._density

    @density.setter
    def density(self, density: float) -> None:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise ValueError(f"density must be > 0 and <= 1, got {density!r}.")
        self._density = density

    @property
    def kept(self) -> int:
        """How many entries are left."""
        return max(1, round(self.density * self.shape[0] * self.shape[1]))

    @property
    def macs(self) -> int:
        """Those of the dense matrix; writing it out is not counted."""
        return self.shape[0] * self.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return x @ self.dense().mT

    def dense(self) -> Tensor:
        """(m, n)."""
        matrix = self.full()
        first_left_out = self.shrink is soft  # which then becomes zero, and no entry that is kept
        return self.shrink(matrix, smallest_kept(matrix, self.kept + first_left_out)).to(self.dtype)

    def full(self) -> Tensor:
        """K (m, n) with all its entries, in float32 or wider."""
        wide = torch.promote_types(self.dtype, torch.float32)
        with without_autocast(self.outputs.device):
            found = self.kernel(self.outputs.to(wide), self.inputs.to(wide))
            first, *others = (c * part for c, part in zip(self.weights, found.unbind(), strict=True))
            matrix = sum(others, first)
            if self.mixing is None:
                return matrix
            share, width, shift = self.mixing.to(wide).unbind()
            return matrix + share * (matrix / width).softmax(0) + shift

    def spec(self) -> dict[str, Any]:
        """Kind, sizes, and how entries are made and left."""
        heads, m, width = self.outputs.shape
        return {
            "kind": "Kernelled",
            "sizes": {"heads": heads, "m": m, "n": self.shape[1], "width": width},
            "weights": list(self.weights),
            "kernel": next(name for name, value in KERNELS.items() if value is self.kernel),
            "shrink": next(name for name, value in SHRINKS.items() if value is self.shrink),
            "density": self.density,
            "mixed": self.mixing is not None,
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Points of the spec's sizes, not initialised."""
        sizes = spec.get("sizes")
        named = {"kind": "Kernelled", **(sizes if isinstance(sizes, Mapping) else {})}
        heads, m, n, width = (size(named, name) for name in ("heads", "m", "n", "width"))
        kernel, shrink = KERNELS.get(str(spec.get("kernel"))), SHRINKS.get(str(spec.get("shrink")))
        weights: Any = spec.get("weights")
        if kernel is None or shrink is None or not _are_numbers(weights):
            raise ValueError(
                f"spec of Kernelled needs 'weights', a kernel of {', '.join(KERNELS)} and a shrink of "
                f"{', '.join(SHRINKS)}."
            )
        return cls(
            torch.empty(heads, m, width, **where),
            torch.empty(heads, n, width, **where),
            weights,
            kernel=kernel,
            shrink=shrink,
            density=spec.get("density", math.nan),
            mixing=torch.empty(3, **where) if spec.get("mixed") else None,
        )


def _are_numbers(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
