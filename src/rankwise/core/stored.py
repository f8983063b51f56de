"""Matrices that a parameter keeps in another form than (out, in): several in one, or transposed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .directions import Direction, formed
from .seen import Seen
from .states import State, map_state
from .transforms import Transform, as_matrices, within

BLOCK = 2**24  # numbers of slices that are stepped together, where it is not fewer than one slice has


@dataclass(frozen=True)
class Batched(Transform):
    """Step each slice of parameters (e, m, n) as a matrix of its own; see :func:`batched`.

    States are those of e matrices: each tensor has the axes (k, e, ...). Slices of one parameter have its place,
    so that they take turns with other parameters and not among themselves: else some slice would nearly always
    need its whole gradient, which could never be reduced. Of large parameters some slices are stepped at a time.
    What is no stack never gets here: ``acting_on`` gives it to the inner transform.
    """

    inner: Transform

    def shaped(self, param: Tensor) -> Tensor:
        """Keep the axis of slices: (k, e, m, n)."""
        return param.flatten(3) if param.ndim > 4 else param

    def acting_on(self, param: Tensor) -> Transform:
        """What steps each number alone needs no slices; nor does what is no stack."""
        if param.ndim < 4:
            return self.inner.acting_on(as_matrices(param))
        inner = self.inner.acting_on(param.flatten(0, 1))
        return inner if inner.elementwise else Batched(inner)

    def init(self, param: Tensor, index: Tensor) -> State:
        """The states of all slices, at the place of their parameter."""
        own = self.acting_on(param)
        if not isinstance(own, Batched):
            return own.init(as_matrices(param), index)
        k, e = param.shape[:2]
        state = own.inner.init(param.flatten(0, 1), index.repeat_interleave(e))
        return {"slices": map_state(lambda leaf: _ordered(leaf).view(k, e, *leaf.shape[1:]), state)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> Tensor:
        """(k, e, m, n) -> (k, e, m, n)."""

        def step(cut: Cut) -> Tensor:
            return self.inner.update(grad[cut].flatten(0, 1), _slices(state, cut), param[cut].flatten(0, 1))

        return _each(step, grad)

    def reduce(self, grad: Tensor, state: State, param: Tensor) -> Tensor | None:
        """The reduced forms of the slices, (k e, ...)."""
        return self.inner.reduce(grad.flatten(0, 1), _slices(state), param.flatten(0, 1))

    def update_reduced(self, low: Tensor, state: State, param: Tensor) -> Direction:
        """(k e, ...) -> (k, e, m, n)."""
        reduced = low.unflatten(0, param.shape[:2])

        def step(cut: Cut) -> Tensor:
            inside, mine = _slices(state, cut), param[cut].flatten(0, 1)
            return formed(self.inner.update_reduced(reduced[cut].flatten(0, 1), inside, mine))

        return _each(step, low.new_empty(param.shape, device="meta"), low.device)

    @property
    def reads_param(self) -> bool:
        """Whether the inner transform does."""
        return self.inner.reads_param

    @property
    def constrains(self) -> bool:
        """Whether the inner transform does."""
        return self.inner.constrains

    def constrain(self, param: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """The inner constraint on each slice."""
        bounded = self.inner.constrain(param.flatten(0, 1), _slices(state), lr, weight_decay)
        return bounded.view(param.shape)


Cut = tuple[slice, slice]  # which parameters, and which of their slices
ALL: Cut = slice(None), slice(None)


def _each(step: Callable[[Cut], Tensor], like: Tensor, device: torch.device | None = None) -> Tensor:
    """Step parameters and slices like (k, e, m, n): all together, or of one large parameter some at a time."""
    k, e, *size = like.shape
    count = max(1, BLOCK // max(1, math.prod(size)))
    if k > 1 or count >= e:
        return step(ALL).view(like.shape)
    found = torch.empty(like.shape, dtype=like.dtype, device=device or like.device)
    for low in range(0, e, count):
        cut = slice(None), slice(low, low + count)
        found[cut] = step(cut).view(found[cut].shape)
    return found


def _slices(state: State, cut: Cut = ALL) -> State:
    """Views (k e, ...) of states (k, e, ...), so that what is written into them stays."""

    def view(leaf: Tensor) -> Tensor:
        leaf = leaf[cut]
        return leaf.view(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])

    return map_state(view, state["slices"])


def _ordered(leaf: Tensor) -> Tensor:
    """Numbers of slices (k e, r) one after the other in memory, which stacks do not take for matrices then."""
    return leaf.contiguous() if leaf.ndim == 2 else leaf


@dataclass(frozen=True)
class Transposed(Seen):
    """Show matrices that are stored as (in, out) as (out, in); see :func:`transposed`."""

    def there(self, values: Tensor) -> Tensor:
        """(k, in, out) -> (k, out, in); vectors stay."""
        return values.mT if values.ndim > 2 else values

    def back(self, seen: Direction, like: Tensor) -> Direction:
        """(k, out, in) -> (k, in, out)."""
        return seen.mT if like.ndim > 2 else seen

    def acting_on(self, param: Tensor) -> Transform:
        """What steps each number alone needs no order."""
        inner = self.inner.acting_on(self.there(param))
        return inner if inner.elementwise else Transposed(inner)


def batched(transform: Transform) -> Transform:
    """Treat parameters (e, m, n) as e matrices, as those of a mixture's experts are, which step side by side.

    Without it such a parameter counts as one matrix (e, m n), as a convolution's does. All other parameters get
    the transform itself.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> from rankwise.optimizers import galore
    >>> experts, expert = torch.zeros(4, 32, 64), torch.zeros(32, 64)
    >>> state_bytes(batched(galore(rank=8)), experts) == 4 * state_bytes(galore(rank=8), expert)
    True

    Args:
        transform: of each matrix. It stands outermost: no other transform is put around what this returns.
    """
    return transform if isinstance(transform, Batched) else Batched(transform)


def transposed(transform: Transform) -> Transform:
    """Treat matrices as stored in the order (in, out), as those of GPT-2 are.

    It matters to transforms that tell rows from columns, such as the length of Muon's steps. With ``batched`` it
    is for stacks (e, in, out). All that are no matrices get the transform itself.

    >>> from rankwise.optimizers import muon
    >>> transposed(batched(muon())) == batched(transposed(muon()))
    True

    Args:
        transform: of matrices (out, in).
    """
    return Batched(Transposed(transform.inner)) if isinstance(transform, Batched) else Transposed(transform)


def refuse_batched_inside(transform: Transform) -> None:
    """Raise ValueError if something stands around ``batched``, which would never see an axis of slices."""
    if any(isinstance(part, Batched) for part in within(transform)):
        raise ValueError(f"batched(...) stands inside {type(transform).__name__}; put it outermost.")
