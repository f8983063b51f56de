"""What processes tell each other about curvature, with bytes and seconds counted by phase."""

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Tensors = Mapping[str, Tensor]


class Traffic:
    """Bytes and seconds of the phases of some work.

    Bytes are those of the tensors that this process gives to an exchange or gets by a broadcast; how a backend
    sends them, perhaps several times, is not counted.

    Args:
        synchronise: wait for the accelerator at both ends of a phase, so that its seconds are those of the work.
    """

    def __init__(self, synchronise: bool = False) -> None:
        self.synchronise = synchronise
        self.phases: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of what is done inside."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        found = self._of(name)
        found["seconds"] += time.perf_counter() - start
        found["times"] += 1

    def count(self, name: str, *tensors: Tensor) -> None:
        """Count the bytes of tensors."""
        self._of(name)["bytes"] += sum(tensor.nbytes for tensor in tensors)

    def table(self) -> dict[str, dict[str, float]]:
        """Return ``{"bytes": ..., "seconds": ..., "times": ...}`` of each phase, summed since the beginning."""
        return {name: dict(found) for name, found in self.phases.items()}

    def _of(self, name: str) -> dict[str, float]:
        return self.phases.setdefault(name, {"bytes": 0, "seconds": 0.0, "times": 0})

    def _wait(self) -> None:
        if self.synchronise and torch.accelerator.is_available():
            torch.accelerator.synchronize()


class Exchange:
    """Sums, gathers and broadcasts of many tensors at once over a group of processes; with one, nothing.

    Args:
        traffic: counts.
        group: of processes; None means all, or this one alone where torch.distributed is not at work.
    """

    def __init__(self, traffic: Traffic, group: Any = None) -> None:
        self.traffic, self.group = traffic, group
        at_work = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if at_work else 1
        self.rank = dist.get_rank(group) if at_work else 0

    def add(self, phase: str, tensors: Tensors) -> dict[str, Tensor]:
        """Return the sums over all processes of tensors that have the same sizes everywhere."""
        if self.size == 1:
            return dict(tensors)
        found = {}
        for part in _by_type(tensors):
            flat = _flat(part)
            self.traffic.count(phase, flat)
            dist.all_reduce(flat, group=self.group)
            found.update(_cut(flat, {name: tensor.shape for name, tensor in part.items()}))
        return {name: found[name] for name in tensors}

    def gather(self, phase: str, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors of all processes, concatenated on the first axis, in which alone they may differ."""
        if self.size == 1:
            return dict(tensors)
        found = {}
        for part in _by_type(tensors):
            shapes: list[Any] = [None] * self.size
            dist.all_gather_object(shapes, {name: tuple(t.shape) for name, t in part.items()}, group=self.group)
            lengths = [sum(torch.Size(shape).numel() for shape in each.values()) for each in shapes]
            flat = _flat(part)
            self.traffic.count(phase, flat)
            filled = torch.cat([flat, flat.new_zeros(max(lengths) - len(flat))])
            every = [torch.empty_like(filled) for _ in range(self.size)]
            dist.all_gather(every, filled, group=self.group)
            cut = [_cut(each, sizes) for each, sizes in zip(every, shapes, strict=True)]
            found.update({name: torch.cat([each[name] for each in cut]) for name in part})
        return {name: found[name] for name in tensors}

    def spread(self, phase: str, tensors: Tensors, owners: Collection[int]) -> dict[str, Tensor]:
        """Return the tensors of all processes; no two own one of the same name.

        Args:
            phase: under which bytes are counted.
            tensors: what this process owns.
            owners: the processes that own anything; the same everywhere.
        """
        if self.size == 1:
            return dict(tensors)
        shapes: list[Any] = [None] * self.size
        mine = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        dist.all_gather_object(shapes, mine, group=self.group)
        like = next(iter(tensors.values()), None)
        found: dict[str, Tensor] = {}
        for owner in sorted(owners):
            for dtype in sorted({dtype for _, dtype in shapes[owner].values()}, key=str):
                sizes = {name: shape for name, (shape, kind) in shapes[owner].items() if kind == dtype}
                if owner == self.rank:
                    flat = _flat({name: tensors[name] for name in sizes})
                else:
                    length = sum(torch.Size(shape).numel() for shape in sizes.values())
                    flat = torch.empty(length, dtype=dtype, device=self._device(like))
                self.traffic.count(phase, flat)
                dist.broadcast(flat, group=self.group, group_src=owner)
                found.update(_cut(flat, sizes))
        return found

    def _device(self, like: Tensor | None) -> torch.device:
        """Where tensors of others are put."""
        if like is not None:
            return like.device
        return torch.device("cpu") if dist.get_backend(self.group) == "gloo" else torch.device("cuda")

    def divided(self, parts: int) -> "Exchange":
        """Return the exchange within this process's part of ``parts`` equal ones; all processes must call it."""
        if parts == 1:
            return self
        if self.size % parts:
            raise ValueError(f"{self.size} processes are not divided into {parts} equal parts.")
        width, first = self.size // parts, None
        for low in range(0, self.size, width):
            ranks = [dist.get_global_rank(self._group(), each) for each in range(low, low + width)]
            group = dist.new_group(ranks)
            if low <= self.rank < low + width:
                first = group
        return Exchange(self.traffic, first)

    def _group(self) -> Any:
        return dist.group.WORLD if self.group is None else self.group


def place(costs: Mapping[str, float], processes: int) -> dict[str, int]:
    """Give each piece of work to a process, the dearest first, always to the one with the least so far.

    >>> place({"a": 8.0, "b": 1.0, "c": 7.0, "d": 2.0}, 2)
    {'a': 0, 'c': 1, 'd': 1, 'b': 0}
    """
    loads = [0.0] * processes
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += costs[name]
    return owners


def _by_type(tensors: Tensors) -> list[dict[str, Tensor]]:
    """Tensors of one type together, in an order that is the same everywhere."""
    kinds = sorted({tensor.dtype for tensor in tensors.values()}, key=str)
    return [{name: t for name, t in sorted(tensors.items()) if t.dtype == kind} for kind in kinds]


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def _cut(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Undo :func:`_flat`; what follows the last tensor is left."""
    found, low = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        found[name], low = flat[low : low + size].view(torch.Size(shape)).clone(), low + size
    return found
