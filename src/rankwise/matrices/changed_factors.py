"""A matrix kept in factors, with something added to each factor instead of to their product."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base import StructuredMatrix, as_given, widened
from .frozen import Base


class ChangedFactors(StructuredMatrix):
    """(U + X) (V + Y) for W = U V, and the same for all structures: each stored factor with its own change.

    The changed matrix has the structure of W, so that :meth:`merged` takes the changes in without a number more.
    The changed factors are written out for every product, in the type of the changes; what is larger, their
    product, never is.

    Args:
        base: W, of any kind.
        changes: for names of 2-D parameters of the matrix in ``base`` what is added to them.

    >>> import torch
    >>> from rankwise.matrices import Dense, LowRank
    >>> base = Base(LowRank(torch.ones(3, 1), torch.ones(1, 2)))
    >>> changed = ChangedFactors(base, {"left": Dense(torch.ones(3, 1))})
    >>> changed.dense().tolist(), changed.merged().spec() == base.matrix.spec()
    ([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]], True)
    """

    def __init__(self, base: Base, changes: Mapping[str, StructuredMatrix]) -> None:
        super().__init__()
        if not isinstance(base, Base):
            raise TypeError(f"ChangedFactors takes a Base, got {type(base).__name__}.")
        if not changes:
            raise ValueError("ChangedFactors needs at least one change.")
        stored = dict(base.matrix.named_parameters())
        for name, change in changes.items():
            if name not in stored or stored[name].shape != change.shape:
                found = {key: tuple(value.shape) for key, value in stored.items()}
                raise ValueError(f"the base has no factor {name!r} of shape {change.shape}, but {found}.")
        self.applied, self.names = _Applied(base), tuple(changes)
        self.changes, self.shape = nn.ModuleList(changes.values()), base.shape

    @property
    def base(self) -> Base:
        """W."""
        return self.applied.base

    @property
    def rank(self) -> int:
        """That of the base."""
        return self.base.rank

    @property
    def macs(self) -> int:
        """Those of the base; writing the changed factors out is not counted."""
        return self.base.macs

    def merged(self) -> StructuredMatrix:
        """Return a matrix as the base holds one, with the changes in its factors, rounded once to their types."""
        made = copy.deepcopy(self.base.matrix)
        with torch.no_grad():
            for name, value in self._factors().items():
                made.get_parameter(name).copy_(value)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        wide = widened(x, self._wide)
        return as_given(self._use(lambda matrix: matrix(wide)), x)

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        wide = widened(y, self._wide)
        return as_given(self._use(lambda matrix: matrix.adjoint(wide)), y)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m), rounded once to the type of the base."""
        return self._use(lambda matrix: matrix.lookup(index)).to(self.base.dtype)

    def dense(self) -> Tensor:
        """(m, n), rounded once to the type of the base."""
        return self._use(lambda matrix: matrix.dense()).to(self.base.dtype)

    def spec(self) -> dict[str, Any]:
        """Kind, the spec of the base, and those of the changes by the names of factors."""
        changes = {name: change.spec() for name, change in self._changes.items()}
        return {"kind": "ChangedFactors", "base": self.base.spec(), "changes": changes}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """Changes that are not initialised, around a base that is not either."""
        from . import from_spec

        base, changes = from_spec(spec.get("base"), **where), spec.get("changes")
        if not isinstance(base, Base) or not isinstance(changes, Mapping):
            raise ValueError(f"spec of {cls.__name__} needs 'base', a Base, and 'changes', a mapping.")
        return cls(base, {name: from_spec(change, **where) for name, change in changes.items()})

    @property
    def _changes(self) -> dict[str, StructuredMatrix]:
        return dict(zip(self.names, cast(list[StructuredMatrix], list(self.changes)), strict=True))

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.base.dtype, self._changes[self.names[0]].dtype)

    def _factors(self) -> dict[str, Tensor]:
        """The changed factors, in the wider type."""
        stored = self.base.matrix
        return {name: stored.get_parameter(name) + change.dense() for name, change in self._changes.items()}

    def _use(self, use: Callable[[StructuredMatrix], Tensor]) -> Tensor:
        """Compute something with the changed matrix; the rest of it is converted to the wider type."""
        state = self.base.matrix.state_dict(keep_vars=True)
        state = {name: t.to(self._wide) if t.is_floating_point() else t for name, t in state.items()}
        values = {f"base.matrix.{name}": tensor for name, tensor in (state | self._factors()).items()}
        return functional_call(self.applied, values, (use,))


class _Applied(nn.Module):
    """What is done with a matrix, as torch's ``functional_call`` takes it."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(self, use: Callable[[StructuredMatrix], Tensor]) -> Tensor:
        return use(self.base.matrix)
