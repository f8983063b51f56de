"""What processes tell each other about curvature, with bytes and seconds counted by phase."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
        device: where tensors of others are put; small ones that their owner keeps on the CPU get there.
        alone: whether this process has nothing to tell, though there may be others.

    Raises:
        ValueError: if this process is not one of the group.
    """

    def __init__(
        self, traffic: Traffic, group: Any = None, device: torch.device | str = "cpu", *, alone: bool = False
    ) -> None:
        self.traffic, self.group, self.device = traffic, group, torch.device(device)
        at_work = dist.is_available() and dist.is_initialized() and not alone
        self.size = dist.get_world_size(group) if at_work else 1
        self.rank = dist.get_rank(group) if at_work else 0
        if self.rank < 0:
            raise ValueError("this process is not one of the group; make the handle in those that are.")

    def add(self, phase: str, tensors: Tensors) -> dict[str, Tensor]:
        """Return the sums over all processes of tensors that have the same sizes everywhere."""
        if self.size == 1:
            return dict(tensors)
        found = {}
        for part in _by_type(tensors):
            flat = self._flat(part)
            self.traffic.count(phase, flat)
            self._tell(dist.all_reduce, flat)
            found.update(_cut(flat, {name: tensor.shape for name, tensor in part.items()}))
        return {name: found[name] for name in tensors}

    def extremes(self, phase: str, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest of each number over all processes."""
        if self.size == 1:
            return numbers, numbers
        both = torch.cat([-numbers, numbers])
        self.traffic.count(phase, both)
        self._tell(dist.all_reduce, both, op=dist.ReduceOp.MAX)
        least, largest = both.chunk(2)
        return -least, largest

    def gather(self, phase: str, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors of all processes, concatenated on the first axis.

        Where they differ in another axis, they are filled up with zeros. Filling is not counted as bytes.
        """
        if self.size == 1:
            return dict(tensors)
        found = {}
        for part in _by_type(tensors):
            shapes = self._objects({name: tuple(t.shape) for name, t in part.items()})
            lengths = [sum(torch.Size(shape).numel() for shape in each.values()) for each in shapes]
            flat = self._flat(part)
            self.traffic.count(phase, flat)
            filled = torch.cat([flat, flat.new_zeros(max(lengths) - len(flat))])
            every = [torch.empty_like(filled) for _ in range(self.size)]
            self._tell(dist.all_gather, every, filled)
            cut = [_cut(each, sizes) for each, sizes in zip(every, shapes, strict=True)]
            found.update({name: torch.cat(_filled([each[name] for each in cut])) for name in part})
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
        shapes = self._objects({name: (tuple(t.shape), t.dtype, t.is_cpu) for name, t in tensors.items()})
        found: dict[str, Tensor] = {}
        for owner in sorted(owners):
            for dtype in sorted({dtype for _, dtype, _ in shapes[owner].values()}, key=str):
                sizes = {name: shape for name, (shape, kind, _) in shapes[owner].items() if kind == dtype}
                if owner == self.rank:
                    flat = self._flat({name: tensors[name] for name in sizes})
                else:
                    length = sum(torch.Size(shape).numel() for shape in sizes.values())
                    flat = torch.empty(length, dtype=dtype, device=self.device)
                self.traffic.count(phase, flat)
                self._tell(dist.broadcast, flat, group_src=owner)
                cut = _cut(flat, sizes)
                found.update({name: t.cpu() if shapes[owner][name][2] else t for name, t in cut.items()})
        return found

    def divided(self, parts: int) -> "Exchange":
        """Return the exchange within this process's part of ``parts`` equal ones; all processes must call it."""
        if parts == 1:
            return self
        if self.size % parts:
            raise ValueError(f"{self.size} processes are not divided into {parts} equal parts.")
        width = self.size // parts
        low = self.rank // width * width
        whole: Any = dist.group.WORLD if self.group is None else self.group
        ranks = [dist.get_global_rank(whole, each) for each in range(low, low + width)]
        group = dist.new_group(ranks, use_local_synchronization=True)
        return Exchange(self.traffic, group, self.device)

    def _objects(self, mine: Any) -> list[Any]:
        """Return what every process has to say; not counted."""
        found: list[Any] = [None] * self.size
        self._tell(dist.all_gather_object, found, mine)
        return found

    def _tell(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call a function of torch.distributed, and say what to do where it fails."""
        try:
            function(*arguments, **options, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"the {self.size} processes could not exchange what preconditioning needs; one of them may have "
                f"ended or be stuck: end all, and go on from the last checkpoint with any number of processes "
                f"({error})."
            ) from error

    def _flat(self, tensors: Tensors) -> Tensor:
        return torch.cat([tensor.to(self.device).reshape(-1) for tensor in tensors.values()])


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


def parts_of(processes: int, workers: float) -> int:
    """Return into how many equal parts processes fall, of which each has a share ``workers`` of them.

    A share of less than one process is one.

    Raises:
        ValueError: if there are no such parts.

    >>> parts_of(4, 1.0), parts_of(4, 0.5), parts_of(1, 0.5)
    (1, 2, 1)
    """
    wanted = max(1.0, workers * processes)
    width = round(wanted)
    if processes % width or abs(wanted - width) > 1e-6 * processes:
        fitting = ", ".join(f"{each}/{processes}" for each in range(1, processes + 1) if processes % each == 0)
        raise ValueError(
            f"workers must be a share that divides {processes} processes ({fitting}), got {workers}."
        )
    return processes // width


def _by_type(tensors: Tensors) -> list[dict[str, Tensor]]:
    """Tensors of one type together, in an order that is the same everywhere."""
    kinds = sorted({tensor.dtype for tensor in tensors.values()}, key=str)
    return [{name: t for name, t in sorted(tensors.items()) if t.dtype == kind} for kind in kinds]


def _filled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fill up with zeros all axes but the first to the largest sizes."""
    sizes = [max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    if all(list(tensor.shape[1:]) == sizes for tensor in tensors):
        return [*tensors]
    found = []
    for tensor in tensors:
        whole = tensor.new_zeros(len(tensor), *sizes)
        whole[tuple(slice(length) for length in tensor.shape)] = tensor
        found.append(whole)
    return found


def _cut(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Cut tensors out of a row of all their numbers; what follows the last one is left."""
    found, low = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        found[name], low = flat[low : low + size].view(torch.Size(shape)).clone(), low + size
    return found
