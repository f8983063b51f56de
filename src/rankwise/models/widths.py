"""Numbers of an architecture that can shrink: which fields of a config count what, and what belongs to each unit.

Nothing here knows the name of a family or a layer. A config with one field lower gives other shapes inside the
blocks: these tell what belongs to a unit. Whether units can really be dropped is then tried on the model.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.finite import is_finite
from ..core.statistics import Batch
from ..core.surgery import Site
from .blocks import find_blocks
from .exchange import (
    Exchange,
    Numbers,
    Path,
    built,
    configs_in,
    outputs_of,
    parameters_of,
    same_outputs,
    shapes_of,
)

Shapes = Mapping[str, torch.Size]
Losses = Mapping[str, tuple[int, int]]  # parameter -> the axis along which it shrinks, and by how much

HEAD = "head_dim"  # transformers' word for the size of a head where the hidden size does not decide it


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a parameter shrinks with the number of units.

    Args:
        axis: along which its units lie.
        count: units.
        per: entries of each.
        stacked: whether all first entries of units come before all second ones, as where one matrix holds gate
            and up; otherwise the entries of a unit lie side by side.
    """

    axis: int
    count: int
    per: int
    stacked: bool = False

    def places(self, units: Tensor) -> Tensor:
        """Return where the entries of units (u,) lie, (u * per,)."""
        entries = torch.arange(self.per, device=units.device)
        if self.stacked:
            return (entries[:, None] * self.count + units).flatten()
        return (units[:, None] * self.per + entries).flatten()

    def part(self, parameter: Tensor, units: Tensor) -> Tensor:
        """Return what units are of a parameter."""
        return parameter.detach().index_select(self.axis, self.places(units.to(parameter.device)))

    def spread(self, part: Tensor, units: Tensor, like: Tensor) -> Tensor:
        """Return a parameter of the shape of ``like`` with a part for some units, and zeros for the others."""
        places = self.places(units.to(like.device))
        return torch.zeros_like(like).detach().index_copy(self.axis, places, part.to(like))


@dataclasses.dataclass(frozen=True)
class Width:
    """A number of an architecture: how many units every block has, such as neurons or groups of heads.

    In each block one matrix, the consumer, reads what the units make; all else of a unit makes it.

    Args:
        fields: the fields of the config that count units, and how many of its own each counts for one unit.
        fixed: fields of the config that would follow these unless they are given.
        count: units.
        blocks: for each block the layer that reads its units, and what they are in each parameter, by its name.
    """

    fields: Numbers
    fixed: Numbers
    count: int
    blocks: Mapping[str, Mapping[str, Cut]]

    @property
    def cuts(self) -> dict[str, Cut]:
        """What the units of all blocks are in each parameter, by its name."""
        return {name: cut for cuts in self.blocks.values() for name, cut in cuts.items()}

    @property
    def name(self) -> str:
        """The config's word for the number."""
        return min(self.fields, key=lambda path: self.fields[path])[-1]

    @property
    def size(self) -> int:
        """How many inputs of a consumer one unit makes."""
        return next(cuts[f"{name}.weight"].per for name, cuts in self.blocks.items())

    def numbers(self, units: int) -> Numbers:
        """Return the fields of a config for so many units."""
        return {**self.fixed, **{path: each * units for path, each in self.fields.items()}}


def find_widths(model: Any, sites: Mapping[str, Site], batch: Batch) -> list[Width]:
    """Find the numbers of an architecture whose units can be dropped one by one from every block.

    Candidates are fields of the config, and pairs of them that shrink in step, such as query heads and the
    key-value heads that they share. Each is tried: without some units the model must compute what it computes
    when no consumer reads these.

    Args:
        model: of transformers; it is as before afterwards.
        sites: the matrices that may shrink.
        batch: what the model takes.

    Raises:
        ValueError: if the model has no blocks, its parameters are not those that its config asks for, blocks
            share a parameter, or there is no such number.
    """
    base, live = shapes_of(built(model, {})), shapes_of(model)
    wrong = next((name for name in base | live if base.get(name) != live.get(name)), None)
    if wrong is not None:
        raise ValueError(
            f"{wrong} is {live.get(wrong)}, but the config asks for {base.get(wrong)}; narrow a model before it "
            "is compressed."
        )
    try:
        blocks = find_blocks(model)
    except ValueError:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks; nothing in it can be narrowed."
        ) from None
    _refuse_shared(model, blocks)
    if not all(map(is_finite, outputs_of(model, batch, {}))):
        raise ValueError("the model's outputs are not finite; look at its weights and inputs.")
    found: list[Width] = []
    tried: dict[str, None] = {}
    for width in _Candidates(model, base, blocks, sites):
        if not any(each.blocks.keys() & width.blocks.keys() for each in found):
            tried[width.name] = None
            if _droppable(model, width, blocks, batch):
                found.append(width)
    if not found:
        raise ValueError(
            f"no number in the config of {type(model).__name__} counts units of every block of {blocks} that can "
            f"be dropped one by one (tried: {', '.join(tried) or 'none'}); use rankwise.compress."
        )
    return found


def _refuse_shared(model: Any, blocks: str) -> None:
    """Raise if a parameter of the blocks has two names: its units could not be dropped in each by itself."""
    names: dict[int, str] = {}
    for name, parameter in parameters_of(model).items():
        other = names.setdefault(id(parameter), name)
        if other != name and name.startswith(f"{blocks}."):
            raise ValueError(f"{other} and {name} are one parameter; nothing can be narrowed where blocks share.")


def _droppable(model: Any, width: Width, blocks: str, batch: Batch) -> bool:
    """Whether the model without some units computes what it computes when no consumer reads them.

    Random matrices, the same in all blocks, stand in for the model's own, which may hide that units differ.
    """
    cuts, drawn = width.cuts, _drawn(model, blocks, width.cuts)
    readers = [f"{name}.weight" for name in width.blocks]
    for units in (torch.arange(1, width.count, 2), torch.arange(width.count // 2)):
        parts = {id(drawn[name]): cut.part(drawn[name], units) for name, cut in cuts.items()}
        small = drawn | {name: parts[id(drawn[name])] for name in cuts}
        reads = cuts[readers[0]].spread(small[readers[0]], units, drawn[readers[0]])
        whole = drawn | dict.fromkeys(readers, reads)
        try:
            if not same_outputs(model, batch, Exchange(model, width.numbers(len(units)), small), whole):
                return False
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, IndexError):  # shapes that do not fit are an answer
            return False
    return True


def _drawn(model: Any, blocks: str, also: Iterable[str]) -> dict[str, Tensor]:
    """Draw values for the matrices of all blocks, and for some other parameters; equal blocks share them."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple[str, torch.Size], Tensor] = {}
    found = {}
    for name, own in parameters_of(model).items():
        if name.startswith(f"{blocks}.") and (own.dim() > 1 or name in also):
            key = name.removeprefix(f"{blocks}.").partition(".")[2], own.shape
            if key not in drawn:
                value = torch.randn(own.shape, generator=generator) / own.shape[-1] ** 0.5
                drawn[key] = value.to(own.device, own.dtype)
            found[name] = drawn[key]
    return found


class _Candidates:
    """Yields what may be a width, from the shapes of models that are built without values.

    Args:
        model: of transformers.
        base: shapes of its parameters.
        blocks: path of the list of blocks.
        sites: the matrices that may shrink.
    """

    def __init__(self, model: Any, base: Shapes, blocks: str, sites: Mapping[str, Site]) -> None:
        self.model, self.base, self.prefix = model, base, f"{blocks}."
        self.count = len(model.get_submodule(blocks))
        self.sites = {f"{name}.weight": site for site in sites.values() for name in site.names}
        self.inputs = {site.weight.shape[1] for name, site in self.sites.items() if name.startswith(self.prefix)}

    def __iter__(self) -> Iterator[Width]:
        for fixed in self._frames():
            losses = {path: (value, self._losses(fixed, path, value)) for path, value in self._fields(fixed)}
            losses = {path: (value, lost) for path, (value, lost) in losses.items() if lost}
            for path, (value, lost) in losses.items():
                yield from self._widths({path: 1}, fixed, value, lost)
            for one, (value, lost) in losses.items():
                for other, (count, beside) in losses.items():
                    if one != other and value % count == 0 and not self._consumers(beside):
                        both = _together(lost, value // count, beside)
                        yield from self._widths({one: value // count, other: 1}, fixed, count, both)

    def _frames(self) -> Iterator[Numbers]:
        """Yield what is held while other fields change: nothing, or the size of a head that follows from them."""
        yield {}
        for path, config in configs_in(self.model.config):
            if getattr(config, HEAD, None) is None:
                counts = {value for value in _integers(config).values() if value > 1}
                for size in sorted({n // count for n in self.inputs for count in counts if n % count == 0}):
                    fixed = {(*path, HEAD): size}
                    if self._shapes(fixed) == self.base and self._shapes({(*path, HEAD): size - 1}) != self.base:
                        yield fixed

    def _fields(self, fixed: Numbers) -> Iterator[tuple[Path, int]]:
        """Yield the integers of the config, and for fields that are None what they stand for."""
        for path, config in configs_in(self.model.config):
            for name, value in _integers(config).items():
                if value > 1 and (*path, name) not in fixed:
                    yield (*path, name), value
            for name in [name for name, value in vars(config).items() if value is None and name[0] != "_"]:
                values = sorted(self.inputs, reverse=True)
                fits = (value for value in values if self._shapes({**fixed, (*path, name): value}) == self.base)
                for value in itertools.islice(fits, 1):  # all fit if it counts nothing here
                    yield (*path, name), value

    def _shapes(self, numbers: Numbers) -> Shapes:
        """Return the shapes with other numbers, or none where transformers cannot build that."""
        try:
            return shapes_of(built(self.model, numbers))
        except Exception:  # each family refuses numbers in its own way
            return {}

    def _losses(self, fixed: Numbers, path: Path, value: int) -> Losses:
        """Return what parameters of the blocks lose when a field is one lower; nothing if others change too."""
        shapes, found = self._shapes({**fixed, path: value - 1}), {}
        for name in self.base.keys() | shapes.keys():
            old, new = self.base.get(name, ()), shapes.get(name, ())
            if len(old) != len(new) or len(old) == 0:
                return {}
            axes = [i for i in range(len(old)) if old[i] != new[i]]
            if len(axes) > 1 or (axes and not (name.startswith(self.prefix) and new[axes[0]] < old[axes[0]])):
                return {}
            if axes:
                found[name] = (axes[0], old[axes[0]] - new[axes[0]])
        return found

    def _consumers(self, losses: Losses) -> list[str]:
        """Return the matrices that lose inputs."""
        flat = {
            name: axis for name, (axis, _) in losses.items() if name in self.sites and len(self.base[name]) == 2
        }
        return [name for name, axis in flat.items() if axis == self._side(name)]

    def _side(self, name: str) -> int:
        """Return the axis of a stored matrix along which its inputs lie."""
        return self.sites[name].view.matrix(torch.empty(2, 3, device="meta")).shape.index(3)

    def _widths(self, fields: Numbers, fixed: Numbers, count: int, losses: Losses) -> Iterator[Width]:
        """Yield a width for each way in which the entries of units may lie, unless the losses fit none."""
        blocks: list[dict[str, Cut]] = [{} for _ in range(self.count)]
        for name, (axis, lost) in losses.items():
            shape = self.base[name]
            if lost * count != shape[axis] or (len(shape) > 1 and name not in self.sites):
                return
            block, _, rest = name.removeprefix(self.prefix).partition(".")
            blocks[int(block)][rest] = Cut(axis, count, lost)
        consumers = {name.removeprefix(self.prefix).partition(".")[2] for name in self._consumers(losses)}
        if count < 2 or len(consumers) != 1 or any(block != blocks[0] for block in blocks):
            return
        (consumer,) = consumers
        stacked = {
            rest: dataclasses.replace(cut, stacked=cut.per > blocks[0][consumer].per)
            for rest, cut in blocks[0].items()
        }
        for cuts in [blocks[0], stacked] if stacked != blocks[0] else [blocks[0]]:
            yield Width(
                fields,
                fixed,
                count,
                {
                    f"{self.prefix}{i}.{consumer.removesuffix('.weight')}": {
                        f"{self.prefix}{i}.{rest}": cut for rest, cut in cuts.items()
                    }
                    for i in range(self.count)
                },
            )


def _together(one: Losses, times: int, other: Losses) -> Losses:
    """Add what parameters lose by two fields, one of which shrinks ``times`` as fast."""
    found = {name: (axis, times * lost) for name, (axis, lost) in one.items()}
    for name, (axis, lost) in other.items():
        known = found.get(name, (axis, 0))
        found[name] = (axis, known[1] + lost)
    return found


def _integers(config: Any) -> dict[str, int]:
    return {name: value for name, value in vars(config).items() if type(value) is int}
