"""A small module that stands behind a layer."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional

from ..matrices import Hypercomplex, from_spec
from ..matrices.base import autocast_of


class Bottleneck(nn.Module):
    """h + Up(gelu(Down(h) + b) + c), in the type of its own numbers, which may be wider than that of h.

    Args:
        down: (w, d).
        up: (d, w).

    Raises:
        ValueError: if their shapes do not fit together.
    """

    def __init__(self, down: Hypercomplex, up: Hypercomplex) -> None:
        super().__init__()
        if down.shape != up.shape[::-1]:
            raise ValueError(f"down (w, d) and up (d, w) disagree: {down.shape}, {up.shape}.")
        self.down, self.up = down, up
        self.inner_bias = nn.Parameter(down.left.new_zeros(down.shape[0]))
        self.outer_bias = nn.Parameter(down.left.new_zeros(up.shape[0]))

    @property
    def width(self) -> int:
        """Of its inputs and outputs."""
        return self.up.shape[0]

    def forward(self, h: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        x = h if autocast_of(h.device) is not None else h.to(self.down.dtype)
        inner = functional.gelu(self.down(x) + self.inner_bias, approximate="tanh")
        return h + (self.up(inner) + self.outer_bias).to(h.dtype)

    def spec(self) -> dict[str, Any]:
        """Kind, and the specs of both matrices: with the ``state_dict``, enough to rebuild it."""
        return {"kind": type(self).__name__, "down": self.down.spec(), "up": self.up.spec()}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same around matrices that are not initialised.

        Raises:
            ValueError: if the spec is damaged.
        """
        down, up = (from_spec(spec.get(part), **where) for part in ("down", "up"))
        if not isinstance(down, Hypercomplex) or not isinstance(up, Hypercomplex):
            raise ValueError(f"spec of {cls.__name__} needs 'down' and 'up', each a Hypercomplex.")
        return cls(down, up)
