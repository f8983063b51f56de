"""A matrix whose entries are bounded functions of what is stored."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import StructuredMatrix, check_2d, shape_of

MOST = 0.99  # of the bound: beyond, the inverse is too steep


class Companded(StructuredMatrix):
    """W = height arctan(V / width), entry by entry: no entry is larger than height pi / 2.

    Whatever trains V moves W by a slope of height / width / (1 + (V / width)^2): small entries are moved
    further than large ones. Weight decay acts on V.

    Args:
        values: V, (m, n).
        height: > 0.
        width: > 0.
        learned: whether height and width are parameters, as their logarithms; they need no weight decay.

    References: Cakaj, Mehnert, Yang, "Weight compander", 2023, arXiv 2306.16993. That the function is an
        arctangent is from memory and not verified, nor is what height and width are shared by; here each matrix
        has its own.

    >>> import torch
    >>> matrix = Companded.of(torch.tensor([[0.5, -1.0]]), height=1.0, width=1.0)
    >>> matrix.dense().tolist()
    [[0.5, -1.0]]
    """

    log_height: Tensor
    log_width: Tensor

    def __init__(self, values: Tensor, *, height: float, width: float, learned: bool = False) -> None:
        super().__init__()
        check_2d("values", values)
        for name, value in {"height": height, "width": width}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {value}.")
        self.shape, self.learned = (values.shape[0], values.shape[1]), learned
        self.values = nn.Parameter(values)
        for name, value in (("log_height", height), ("log_width", width)):
            logarithm = values.new_full((), math.log(value))
            if learned:
                self.register_parameter(name, nn.Parameter(logarithm))
            else:
                self.register_buffer(name, logarithm)

    @classmethod
    def of(cls, weight: Tensor, *, height: float, width: float, learned: bool = False) -> Self:
        """Return the matrix whose entries are those of a weight (m, n), as far as the bound allows."""
        inside = (weight / height).clamp(-MOST * math.pi / 2, MOST * math.pi / 2)
        return cls(width * torch.tan(inside), height=height, width=width, learned=learned)

    @property
    def macs(self) -> int:
        """Those of the dense matrix; writing it out is not counted."""
        return self.values.numel()

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return x @ self.dense().mT

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.log_height.exp() * torch.arctan(self.values / self.log_width.exp())

    def spec(self) -> dict[str, Any]:
        """Kind, shape and whether height and width are learned."""
        return {"kind": "Companded", "shape": list(self.shape), "learned": self.learned}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Values of the spec's shape, not initialised."""
        learned = spec.get("learned")
        if not isinstance(learned, bool):
            raise ValueError(f"spec of Companded needs 'learned', true or false, got {learned!r}.")
        return cls(torch.empty(shape_of(spec), **where), height=1.0, width=1.0, learned=learned)
