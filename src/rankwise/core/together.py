"""Layers of one kind that are compressed as one matrix, so that they can share a part of it."""

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .methods import Compressor
from .statistics import Statistic, Stats
from .surgery import Site, sizes_of

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a path


@dataclass(frozen=True)
class Together:
    """One layer, or several whose weights stand below or beside each other in one matrix.

    Args:
        sites: the layers; all weights (m, n).
        axis: 0 for weights below each other, 1 for weights beside each other.
    """

    sites: tuple[Site, ...]
    axis: int = 0

    @property
    def name(self) -> str:
        """That of the first layer."""
        return self.sites[0].name

    @property
    def weight(self) -> Tensor:
        """(k m, n) or (m, k n) of k layers."""
        weights = [site.weight for site in self.sites]
        return weights[0] if len(weights) == 1 else torch.cat(weights, self.axis)

    def method(self, method: Compressor) -> Compressor:
        """Return a method for as many layers as there are."""
        count, given = len(self.sites), cast(Any, method)
        return method if method.layers == count else dataclasses.replace(given, layers=count)

    def statistics(self, of: Callable[[str], Stats], needs: Iterable[type[Statistic]]) -> Stats:
        """Put together what was collected of each layer.

        What the layers have in common, such as inputs where outputs stand below each other, is pooled. Of the
        other side each layer has its own block, multiplied by how much larger its own of the former is than the
        pooled one, so that damage is measured in the same units in all layers.
        """
        found = [of(site.name) for site in self.sites]
        if len(found) == 1:
            return found[0]
        own = "output" if self.axis == 0 else "input"
        pooled = {need: need.pooled([stats[need] for stats in found]) for need in needs if need.side != own}
        sizes = {need: whole.size or 1.0 for need, whole in pooled.items()}
        scales = [math.prod(stats[need].size / size for need, size in sizes.items()) for stats in found]
        blocks = {
            need: need.blocks([stats[need] for stats in found], scales) for need in needs if need.side == own
        }
        return {**pooled, **blocks}

    def parts(self, change: Tensor) -> list[Tensor]:
        """Return a change of the whole weight for each layer, zero outside it."""
        if len(self.sites) == 1:
            return [change]
        found = []
        for i, part in enumerate(change.chunk(len(self.sites), self.axis)):
            alone = torch.zeros_like(change)
            alone.chunk(len(self.sites), self.axis)[i].copy_(part)
            found.append(alone)
        return found


def together(sites: Mapping[str, Site], method: Compressor, unreached: Iterable[str] = ()) -> dict[str, Together]:
    """Group layers as a method wants them: those of one shape whose paths differ in numbers alone, in order.

    Args:
        sites: all layers.
        method: says how many stand together at most, and how.
        unreached: layers that stay alone.

    Returns:
        the groups by their names, in the order of their first layers.
    """
    alone = set(unreached)
    runs: dict[Hashable, list[Site]] = {}  # of each kind the group that is not full
    groups: list[tuple[list[Site], int]] = []
    for name, site in sites.items():
        axis = None if method.layers == 1 or name in alone else method.axis(*sizes_of(site))
        alike = NUMBER.sub("*", name), sizes_of(site), site.matrix.dtype, site.matrix.device
        kind = name if axis is None else alike
        if kind not in runs or len(runs[kind]) == method.layers:
            runs[kind] = []
            groups.append((runs[kind], axis or 0))
        runs[kind].append(site)
    return {run[0].name: Together(tuple(run), axis) for run, axis in groups}
