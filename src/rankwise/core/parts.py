"""What a process holds of a parameter, and what a transform sees of it: all, its own part, or all gathered.

Parameters that are DTensors, such as those of FSDP2's ``fully_shard``, are stepped in one of two ways. Where each
number is stepped by its own gradients alone, each process steps its part, and its state is of that part. Every
other transform sees the whole matrix in each process, all of which take the same step and keep their part of it;
its state is whole in each. The whole gradient is gathered for that, or, where the transform reduces gradients
(see :meth:`Transform.reduce`), only the reduced forms of all parts are added up.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transforms import Transform, working_type


class Part:
    """A parameter that this process holds whole.

    Args:
        param: the parameter.
        transform: what acts on tensors of its shape.
    """

    layout: Any = None  # of what is sharded; parameters that are stacked have the same
    alone = False  # whether it is not stacked

    def __init__(self, param: Tensor, transform: Transform) -> None:
        self.param, self.transform = param, transform
        self.exchanged = 0  # bytes in the last step

    @property
    def shape(self) -> torch.Size:
        """Of what the transform sees."""
        return self.param.shape

    @property
    def own(self) -> Tensor:
        """What this process holds, and writes into."""
        return self.param

    @property
    def own_gradient(self) -> Tensor | None:
        """The gradient of what this process holds."""
        return self.param.grad

    def like(self) -> Tensor:
        """Return what a state begins with: the values that the transform sees, if it reads any.

        Else only shape, type and device mean something.
        """
        return self.param

    def blank(self) -> Tensor:
        """Return a tensor without values of the shape, type and order in memory that the transform sees."""
        return torch.empty_like(self.own, device="meta")

    def value(self) -> Tensor:
        """Return the parameter that the transform sees."""
        return self.param

    def gradient(self) -> Tensor:
        """Return the gradient that the transform sees."""
        assert self.param.grad is not None
        return self.param.grad

    def reduced(self, reduce: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Return the reduced form of the gradient, if that takes less to exchange; see :meth:`Transform.reduce`.

        Args:
            reduce: makes it of a gradient (1, ...) of matrices.
        """
        return None

    def mine(self, seen: Tensor) -> Tensor:
        """Return what this process holds of a tensor that has the shape the transform sees."""
        return seen

    def saved(self, leaf: Tensor) -> Tensor:
        """Return a tensor of the state as it is saved."""
        return leaf

    def loaded(self, leaf: Tensor) -> Tensor:
        """Return a saved tensor as it is in the state.

        Raises:
            ValueError: if other processes are needed to tell what it was.
        """
        if is_sharded(leaf):
            raise ValueError(
                "the state was saved in shards, but the parameter is whole here; load it by "
                "torch.distributed.checkpoint, or save it with StateDictOptions(full_state_dict=True)."
            )
        return leaf


class _Sharded(Part):
    """A parameter of which this process has a part; its gradient has the same layout."""

    param: Any

    @property
    def layout(self) -> Any:  # type: ignore[override]
        """The mesh of processes, and how it is shared out."""
        return self.param.device_mesh, self.param.placements

    @property
    def own(self) -> Tensor:
        """The local tensor."""
        return self.param.detach().to_local()

    @property
    def own_gradient(self) -> Tensor | None:
        """The local gradient."""
        return None if self.param.grad is None else self.param.grad.detach().to_local()

    def mine(self, seen: Tensor) -> Tensor:
        """Cut this process's part out of what all have, without exchanging anything."""
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = self.layout
        everywhere = DTensor.from_local(seen.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=placements).to_local()


class Local(_Sharded):
    """A parameter of which each process steps its part alone, and has the state of that."""

    @property
    def shape(self) -> torch.Size:
        """That of the part."""
        return self.own.shape

    def like(self) -> Tensor:
        """The part."""
        return self.own

    def value(self) -> Tensor:
        """The part."""
        return self.own

    def gradient(self) -> Tensor:
        """That of the part."""
        assert self.own_gradient is not None
        return self.own_gradient

    def mine(self, seen: Tensor) -> Tensor:
        """All that is seen."""
        return seen

    def saved(self, leaf: Tensor) -> Tensor:
        """Say of which whole it is a part, so that it can be loaded elsewhere; counters stay as they are."""
        from torch.distributed.tensor import DTensor

        if not leaf.is_floating_point():
            return leaf
        whole = self._whole()
        if leaf.storage_offset() or leaf.untyped_storage().nbytes() > leaf.nbytes:
            leaf = leaf.clone()  # a DTensor of a part of a stack cannot be pickled
        form = {"shape": whole.shape, "stride": whole.stride()}
        return DTensor.from_local(leaf, *self.layout, run_check=False, **form)

    def loaded(self, leaf: Any) -> Tensor:
        """Take this process's part of a whole tensor, or of one that was saved by as many processes."""
        if not leaf.is_floating_point():
            return leaf
        if leaf.shape != self._whole().shape:
            raise ValueError(f"the state is of shape {tuple(leaf.shape)}, not {tuple(self._whole().shape)}.")
        if not is_sharded(leaf):
            return super().mine(leaf.to(self.own.device))
        mesh, placements = self.layout
        if (leaf.device_mesh.shape, leaf.placements) != (mesh.shape, placements):
            raise ValueError(
                f"the state was saved by {math.prod(leaf.device_mesh.shape)} processes as {leaf.placements}, but "
                f"here are {math.prod(mesh.shape)} and {placements}; load it by torch.distributed.checkpoint, or "
                "save it with StateDictOptions(full_state_dict=True)."
            )
        return leaf.to_local()

    def _whole(self) -> Tensor:
        """Return a tensor of the shape that the state of the whole parameter would have."""
        return self.transform.shaped(torch.empty((1, *self.param.shape), device="meta"))[0]


class Gathered(_Sharded):
    """A parameter that all processes step alike, as whole as the transform wants to see it."""

    alone = True

    def like(self) -> Tensor:
        """All parts, if any is read; else nothing but memory."""
        if self.transform.reads_param:
            return self.value()
        return torch.empty(self.shape, dtype=self.param.dtype, device=self.param.device)

    def blank(self) -> Tensor:
        """Without values of other parts, too."""
        return torch.empty(self.shape, dtype=self.param.dtype, device="meta")

    def value(self) -> Tensor:
        """All parts."""
        return self.param.detach().full_tensor()

    def gradient(self) -> Tensor:
        """All parts."""
        whole = self.param.grad.detach().full_tensor()
        self.exchanged = whole.nbytes
        return whole

    def reduced(self, reduce: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Reduce a gradient that is zero outside the own part, and add up those of all processes."""
        if self._place is None:
            return None
        axis, dim, start = self._place
        mine = self.own_gradient
        assert mine is not None
        padded = torch.zeros(self.shape, dtype=working_type(mine.dtype), device=mine.device)
        padded.narrow(dim, start, mine.shape[dim]).copy_(mine)
        low = reduce(self.transform.shaped(padded.unsqueeze(0)))
        if low is not None:
            dist.all_reduce(low, group=self.param.device_mesh.get_group(axis))
            self.exchanged = low.nbytes
        return low

    @functools.cached_property
    def _place(self) -> tuple[int, int, int] | None:
        """The axis of processes over which a side is cut, that side, and where this part begins; if it is one."""
        cut = [(axis, place.dim) for axis, place in enumerate(self.param.placements) if place.is_shard()]
        if len(cut) != 1:
            return None
        axis, dim = cut[0]
        sizes = [1] * self.param.ndim
        sizes[dim] = self.shape[dim]
        numbers = torch.arange(self.shape[dim], device=self.param.device).view(sizes)
        mine = self.mine(numbers.expand(self.shape)).flatten()
        return axis, dim, int(mine[0]) if mine.numel() else 0


def part_of(param: Tensor, transform: Transform) -> Part:
    """Return how a transform steps a parameter.

    Raises:
        ValueError: if it is sharded in a way that is not supported.
    """
    acting = transform.acting_on(transform.shaped(torch.empty((1, *param.shape), device="meta")))
    if not is_sharded(param):
        return Part(param, acting)
    from torch.distributed.tensor import Replicate, Shard

    placements: Any = param.placements  # type: ignore[attr-defined]
    if not all(type(each) in (Shard, Replicate) for each in placements):
        raise ValueError(
            f"parameters may be sharded by Shard and Replicate, as fully_shard does, not by {placements}; "
            "redistribute them first."
        )
    by_rows = all(each.dim == 0 for each in placements if isinstance(each, Shard))
    return Local(param, acting) if acting.elementwise and (by_rows or param.ndim < 3) else Gathered(param, acting)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; the module of these, which is slow to import, is asked only if it was needed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def agreed(fine: bool, parts: Sequence[Part]) -> bool:
    """Whether all processes that share parameters say so."""
    meshes = {part.layout[0]: part.own.device for part in parts if part.layout is not None}
    for mesh, device in meshes.items():
        votes = torch.tensor(float(fine), device=device)
        for axis in range(mesh.ndim):
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=mesh.get_group(axis))
        fine = bool(votes)
    return fine


def energy(grad: Tensor) -> Tensor:
    """Return the sum of squares of a gradient, in the type of steps; not finite where a number or that is not."""
    return torch.linalg.vector_norm(grad, dtype=working_type(grad.dtype)).square()


def first_not_finite(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor | None:
    """Return the first parameter whose gradient holds NaN or infinity, or whose squares do."""
    pairs = zip(params, grads, strict=True)
    return next((param for param, grad in pairs if not bool(energy(grad).isfinite())), None)
