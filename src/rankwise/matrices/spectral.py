"""A sum of weighted pairs of vectors, a few of which train at a time."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import StructuredMatrix, check_2d, check_rank, shape_of, size


class Spectral(StructuredMatrix):
    """U diag(s) V with all k values trained, and of the vectors r pairs, which may be exchanged for others.

    In evaluation mode gradients are the usual ones. In training mode those of the vectors leave the value out:
    with G the gradient of the matrix, that of u_i is G v_i, not s_i G v_i, and that of v_i is u_i' G. So
    directions turn equally fast, however small their values are.

    Args:
        left: U, (m, k).
        values: s, (k,).
        right: V, (k, n).
        chosen: (r,), different indices of the pairs that train.

    References: Zhao et al., "Sparse spectral training", ICML 2025, arXiv 2405.15481, for the gradients.
    """

    left: Tensor
    right: Tensor
    chosen: Tensor

    def __init__(self, left: Tensor, values: Tensor, right: Tensor, chosen: Tensor) -> None:
        super().__init__()
        check_2d("left", left)
        check_2d("right", right)
        k = len(values)
        if left.shape[1] != k or right.shape[0] != k:
            raise ValueError(
                f"left (m, k), values (k,) and right (k, n) disagree: {tuple(left.shape)}, "
                f"{tuple(values.shape)}, {tuple(right.shape)}."
            )
        check_rank(k, left.shape[0], right.shape[1])
        check_rank(len(chosen), k, k)
        self.shape = (left.shape[0], right.shape[1])
        self.values = nn.Parameter(values)
        self.left_chosen = nn.Parameter(left.new_empty(left.shape[0], len(chosen)))
        self.right_chosen = nn.Parameter(right.new_empty(len(chosen), right.shape[1]))
        for name, tensor in (("left", left), ("right", right), ("chosen", chosen.to(torch.int32))):
            self.register_buffer(name, tensor)
        self.put(left, right, chosen)

    @property
    def rank(self) -> int:
        """How many pairs there are."""
        return len(self.values)

    @property
    def macs(self) -> int:
        """Those of all pairs, and of the chosen ones again, which stand apart."""
        return (self.rank + len(self.chosen)) * (sum(self.shape) + 1)

    @torch.no_grad()
    def put(self, left: Tensor, right: Tensor, chosen: Tensor) -> None:
        """Take other vectors U (m, k) and V (k, n), of which the chosen ones (r,) train."""
        index = chosen.to(left.device, torch.int64)
        self.left_chosen.copy_(left[:, index])
        self.right_chosen.copy_(right[index])
        self.left.copy_(left.index_fill(1, index, 0))
        self.right.copy_(right.index_fill(0, index, 0))
        self.chosen.copy_(index)

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """U (m, k) and V (k, n)."""
        index = self.chosen.long()
        left, right = self.left_chosen.to(self.left.dtype), self.right_chosen.to(self.right.dtype)
        return self.left.index_copy(1, index, left), self.right.index_copy(0, index, right)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self._applied(lambda x, rows: x @ rows.mT, x)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), with the gradients of forward."""
        return self._applied(lambda index, rows: functional.embedding(index, rows.mT), index)

    def _applied(self, times: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """Return (..., m) from the products ``times(x, rows)``, (..., r), with rows (r, n)."""
        rest, values = times(x, self.right) * self.values @ self.left.mT, self.values[self.chosen.long()]
        left, right = self.left_chosen, self.right_chosen
        if not self.training:
            return rest + times(x, right) * values @ left.mT
        low = times(x, right.detach())
        y = rest + low * values @ left.detach().mT
        turned = times(x.detach(), right - right.detach()) @ left.detach().mT  # zero, with a gradient
        return y + turned + low.detach() @ (left - left.detach()).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        values = self.values[self.chosen.long()]
        return y @ self.left * self.values @ self.right + y @ self.left_chosen * values @ self.right_chosen

    def dense(self) -> Tensor:
        """(m, n)."""
        values = self.values[self.chosen.long()]
        return self.left * self.values @ self.right + self.left_chosen * values @ self.right_chosen

    def check(self) -> None:
        """Raise unless the chosen are different pairs."""
        index = self.chosen.tolist()
        if len(set(index)) != len(index) or not all(0 <= i < self.rank for i in index):
            raise ValueError(
                f"chosen must hold different numbers of 0 ... {self.rank - 1}; the tensor is damaged."
            )

    def spec(self) -> dict[str, Any]:
        """Kind, shape, and how many pairs there are and train."""
        return {"kind": "Spectral", "shape": list(self.shape), "rank": self.rank, "trained": len(self.chosen)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Vectors of the spec's sizes, not initialised."""
        m, n = shape_of(spec)
        k = size(spec, "rank", largest=min(m, n))
        chosen = torch.arange(size(spec, "trained", largest=k), device=where.get("device"))
        return cls(torch.empty(m, k, **where), torch.empty(k, **where), torch.empty(k, n, **where), chosen)
