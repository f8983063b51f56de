"""A changed matrix whose rows have trained lengths."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import StructuredMatrix
from .branch import Branch
from .frozen import Base
from .thin import thin_factors


class RowNormalised(StructuredMatrix):
    """W + s B A with each row rescaled to a trained length: DoRA's form.

    The lengths of the rows are found without writing B A out: with W A' from one call of W,
    |row|^2 = |W|^2 + 2 s (W A' * B) + s^2 (B A A' * B), summed over the rank. If they are ``constant``
    no gradient goes through them, so gradients are not those of the dense form: the published method's.

    Args:
        base: W, (m, n).
        update: s B A, around a matrix of a low rank, such as a difference of two products.
        lengths: (m,), trained.
        norms: (m,), the lengths of the rows of W.
        constant: the lengths that are divided by are constants to the gradient.

    References: Liu et al., "DoRA: Weight-decomposed low-rank adaptation", ICML 2024, arXiv 2402.09353; the
        constant denominator is that of its section 4.3.
    """

    norms: Tensor

    def __init__(self, base: Base, update: Branch, lengths: Tensor, norms: Tensor, constant: bool = True) -> None:
        super().__init__()
        if not isinstance(base, Base) or not isinstance(update, Branch) or thin_factors(update) is None:
            raise TypeError("RowNormalised takes a Base and a Branch around a matrix of a low rank.")
        m = base.shape[0]
        if base.shape != update.shape or lengths.shape != (m,) or norms.shape != (m,):
            raise ValueError(
                f"base {base.shape}, update {update.shape}, lengths {tuple(lengths.shape)} and norms "
                f"{tuple(norms.shape)} disagree."
            )
        self.base, self.update, self.lengths = base, update, nn.Parameter(lengths)
        self.constant = constant
        self.register_buffer("norms", norms)
        self.shape = base.shape

    @classmethod
    def of(cls, base: Base, update: Branch, constant: bool = True) -> Self:
        """Start with the lengths that the rows have."""
        with torch.no_grad():
            wide = torch.promote_types(next(update.parameters()).dtype, torch.float32)
            norms = base.dense().detach().to(wide).norm(dim=1)
            made = cls(base, update, torch.zeros_like(norms), norms, constant)
            made.lengths.copy_(made.row_lengths())
        return made

    @property
    def macs(self) -> int:
        """Those of both matrices, and one multiplication an output; the lengths of rows are not counted."""
        return self.base.macs + self.update.macs + self.shape[0]

    def row_lengths(self) -> Tensor:
        """(m,): the lengths of the rows of W + s B A; squares are summed in float32 or wider."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.constant):
            factors = thin_factors(self.update)
            assert factors is not None
            wide = torch.promote_types(self.lengths.dtype, torch.float32)
            left, right = (factor.to(wide) for factor in factors)
            image = self.base(right.to(self.base.dtype)).to(wide)  # (r, m)
            crossed = (image * left.mT).sum(0)
            squared = ((left @ (right @ right.mT)) * left).sum(1)
            squares = self.norms.to(wide).square() + 2 * crossed + squared
            lengths = squares.where(
                squares > 0, torch.finfo(self.lengths.dtype).tiny
            ).sqrt()  # whose slope is finite
            return lengths.to(self.lengths.dtype)

    def _rescaled(self, y: Tensor) -> Tensor:
        """Multiply (..., m) by the factors; what is kept for the backward pass is as short as y.

        Their distances from one lose less in half precision than they would themselves.
        """
        return y + (self.factors() - 1).to(y.dtype) * y

    def factors(self) -> Tensor:
        """(m,): how much longer the rows are to be."""
        lengths = self.row_lengths()
        return self.lengths / lengths

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self._rescaled(self.base(x) + self.update(x))

    def added(self, x: Tensor, product: Tensor) -> Tensor:
        """(..., n), (..., m) -> (..., m)."""
        moved = self.update(x)
        return moved + (self.factors() - 1).to(product.dtype) * (product + moved)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        y = self._rescaled(y)
        return self.base.adjoint(y) + self.update.adjoint(y)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), rounded once to the type of the base."""
        return (self.factors() * (self.base.lookup(index) + self.update.lookup(index))).to(self.base.dtype)

    def dense(self) -> Tensor:
        """(m, n), rounded once to the type of the base."""
        return (self.factors()[:, None] * (self.base.dense() + self.update.dense())).to(self.base.dtype)

    def spec(self) -> dict[str, Any]:
        """Kind, the specs of the matrices, and whether lengths are constants."""
        parts = {"base": self.base.spec(), "update": self.update.spec()}
        return {"kind": "RowNormalised", **parts, "constant": self.constant}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same around matrices that are not initialised."""
        from . import from_spec

        base, update = (from_spec(spec.get(part), **where) for part in ("base", "update"))
        if not isinstance(base, Base) or not isinstance(update, Branch):
            raise ValueError(f"spec of {cls.__name__} needs 'base', a Base, and 'update', a Branch.")
        lengths, norms = (torch.empty(base.shape[0], **where) for _ in range(2))
        return cls(base, update, lengths, norms, bool(spec.get("constant", True)))
