"""Sums, products and multiples of structured matrices are structured matrices."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from .base import StructuredMatrix
from .frozen import Base
from .wrapper import Wrapper


class Expression(StructuredMatrix):
    """Several matrices of any kind; they are submodules, so ``state_dict`` holds what they store."""

    def __init__(self, *members: StructuredMatrix) -> None:
        super().__init__()
        if not members:
            raise ValueError(f"{type(self).__name__} needs at least one matrix.")
        for member in members:
            if not isinstance(member, StructuredMatrix):
                raise TypeError(f"{type(self).__name__} takes StructuredMatrix, got {type(member).__name__}.")
        self.members = nn.ModuleList(members)

    @property
    def parts(self) -> list[StructuredMatrix]:
        """The matrices, in order."""
        return cast(list[StructuredMatrix], list(self.members))

    @property
    def params(self) -> int:
        """The sum over the matrices."""
        return sum(part.params for part in self.parts)

    @property
    def macs(self) -> int:
        """The sum over the matrices."""
        return sum(part.macs for part in self.parts)

    def spec(self) -> dict[str, Any]:
        """Kind, and the specs of the matrices."""
        return {"kind": type(self).__name__, "members": [part.spec() for part in self.parts]}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same expression of matrices that are not initialised."""
        from . import from_spec

        members = spec.get("members")
        if not isinstance(members, (list, tuple)):
            raise ValueError(f"spec of {cls.__name__} needs 'members', a list of specs, got {members!r}.")
        return cls(*[from_spec(member, **where) for member in members])


class Sum(Expression):
    """The sum of matrices of one shape.

    Args:
        terms: at least one; all (m, n).

    >>> import torch
    >>> from rankwise.matrices import Dense, LowRank
    >>> Sum(Dense(torch.eye(2)), LowRank(torch.ones(2, 1), torch.ones(1, 2))).dense().tolist()
    [[2.0, 1.0], [1.0, 2.0]]
    """

    def __init__(self, *terms: StructuredMatrix) -> None:
        super().__init__(*terms)
        if len({term.shape for term in terms}) > 1:
            raise ValueError(f"the terms of a Sum must have one shape, got {[term.shape for term in terms]}.")
        self.shape = terms[0].shape

    @property
    def rank(self) -> int:
        """The ranks of the terms add up, as far as the shape allows."""
        return min(*self.shape, sum(part.rank for part in self.parts))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        first, *others = self.parts
        y = first(x)
        for part in others:
            y = y + part(x)
        return y

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """(..., n) -> (..., m); the first term, which is the base of an adapter, adds the bias."""
        first, *others = self.parts
        y = first.affine(x, bias)
        for part in others:
            y = y + part(x)
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        first, *others = self.parts
        x = first.adjoint(y)
        for part in others:
            x = x + part.adjoint(y)
        return x

    def added(self, x: Tensor, product: Tensor) -> Tensor:
        """(..., n), (..., m) -> (..., m): the other terms, where one is the base."""
        i = next((i for i, part in enumerate(self.parts) if isinstance(part, Base)), None)
        if i is None or len(self.parts) == 1:
            return super().added(x, product)
        first, *others = (part for j, part in enumerate(self.parts) if j != i)
        y = first(x)
        for part in others:
            y = y + part(x)
        return y

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), added in the widest type of the terms and rounded once."""
        first, *others = (part.lookup(index) for part in self.parts)
        for part in others:
            first = first + part
        return first.to(self.dtype)

    def dense(self) -> Tensor:
        """(m, n), added in the widest type of the terms and rounded once."""
        first, *others = (part.dense() for part in self.parts)
        for part in others:
            first = first + part  # torch takes the wider type
        return first.to(self.dtype)


def beside_base(matrix: StructuredMatrix) -> list[StructuredMatrix]:
    """Return what a sum adds to the one base among its terms, or nothing if a matrix is no such sum."""
    parts = matrix.parts if isinstance(matrix, Sum) else []
    others = [part for part in parts if not isinstance(part, Base)]
    return others if len(others) == len(parts) - 1 else []


class Product(Expression):
    """The matrix product of matrices whose shapes fit together; the last one is applied first.

    Args:
        factors: at least one; each has as many columns as the next has rows.

    >>> import torch
    >>> from rankwise.matrices import Dense, Diagonal
    >>> Product(Dense(torch.ones(1, 2)), Diagonal(torch.tensor([2.0, 3.0]))).dense().tolist()
    [[2.0, 3.0]]
    """

    def __init__(self, *factors: StructuredMatrix) -> None:
        super().__init__(*factors)
        for left, right in itertools.pairwise(factors):
            if left.shape[1] != right.shape[0]:
                raise ValueError(
                    f"the factors of a Product disagree: {left.shape} cannot multiply {right.shape}."
                )
        self.shape = (factors[0].shape[0], factors[-1].shape[1])

    @property
    def rank(self) -> int:
        """The smallest rank of a factor."""
        return min(part.rank for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        for part in reversed(self.parts):
            x = part(x)
        return x

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """(..., n) -> (..., m); the first factor adds the bias."""
        first, *others = self.parts
        for part in reversed(others):
            x = part(x)
        return first.affine(x, bias)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        for part in self.parts:
            y = part.adjoint(y)
        return y

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m): those of the last two matrices, through the others."""
        if len(self.parts) == 1:
            return self.parts[0].lookup(index)
        *others, left, last = self.parts
        x = last.lookup_through(left, index)
        for part in reversed(others):
            x = part(x)
        return x

    def dense(self) -> Tensor:
        """(m, n), multiplied in the widest type of the factors and rounded once."""
        first, *others = (part.dense() for part in self.parts)
        for part in others:
            wide = torch.promote_types(first.dtype, part.dtype)
            first = first.to(wide) @ part.to(wide)
        return first.to(self.dtype)


class Scaled(Wrapper):
    """A fixed multiple of a matrix; the scale is not trained and stands in the spec.

    Args:
        matrix: (m, n).
        scale: a finite number.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> Scaled(Dense(torch.eye(2)), 0.5).dense().tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    def __init__(self, matrix: StructuredMatrix, scale: float) -> None:
        super().__init__(matrix)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}.")
        self.scale = float(scale)

    @property
    def macs(self) -> int:
        """Those of the matrix, and one multiplication an output."""
        return self.matrix.macs + self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        return self.scale * self.matrix(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        return self.scale * self.matrix.adjoint(y)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m)."""
        return self.scale * self.matrix.lookup(index)

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.scale * self.matrix.dense()

    def spec(self) -> dict[str, Any]:
        """Kind, scale, and the spec of the matrix."""
        return {**super().spec(), "scale": self.scale}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same multiple of a matrix that is not initialised."""
        from . import from_spec

        return cls(from_spec(spec.get("matrix"), **where), spec.get("scale", math.nan))
