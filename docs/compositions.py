"""Write docs/compositions.md: what adapters compose with, tried out on a small network.

Nothing is listed by hand: adapters, their variants, starts, rank rules, compressed bases and optimisers are what
the packages export.

Usage: python docs/compositions.py
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import rankwise
from rankwise import adapters, compressors, initialisers, rank_rules
from rankwise.core.following import Follower
from rankwise.core.methods import Adapter, BlockAdapter, Compressor
from rankwise.matrices import Scheduled

TARGET = Path(__file__).with_name("compositions.md")
WIDTH, RANK, KEEP = 128, 12, 0.5
REFUSALS = (ValueError, RuntimeError)  # the latter where torch's optimisers refuse
DENSE, PLAIN, USUAL = "Dense", "", "AdamW"
SECTIONS = {
    "start": ("Starts", "`start=` of an adapter that has it. Each with and without each rank rule."),
    "ranks": ("Rank rules", "`ranks=` of an adapter that has it. Each with each start, where there are several."),
    "base": ("Bases", "What the matrices are: dense, or compressed by the method of that name before."),
    "optimizer": (
        "Optimisers",
        "Those of `torch.optim`, as they are by default, but that SGD has momentum and LBFGS few iterations.",
    ),
}


class Block(nn.Module):
    """x + Down(tanh(Up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH * 3 // 2), nn.Linear(WIDTH * 3 // 2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(..., WIDTH) -> (..., WIDTH)."""
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """One block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        """(..., WIDTH) -> (..., WIDTH)."""
        return self.blocks[0](x)


def batch(seed: int = 1) -> Tensor:
    """Rows of inputs."""
    return torch.randn(WIDTH, WIDTH, generator=Generator().manual_seed(seed))


def loss_of(output: Tensor, inputs: Tensor, generator: Generator | None = None) -> Tensor:
    """The task: the inputs in reverse order."""
    return (output - inputs.flip(-1)).square().mean()


def exported(package: types.ModuleType, kind: type | tuple[type, ...] = object) -> dict[str, Any]:
    """Return the classes of some kind that a package exports, by name."""
    found = {name: getattr(package, name) for name in package.__all__}
    return {name: each for name, each in found.items() if inspect.isclass(each) and issubclass(each, kind)}


ADAPTERS = exported(adapters, (Adapter, BlockAdapter))
STARTS, RULES = exported(initialisers), exported(rank_rules)
OPTIMIZERS = exported(torch.optim, torch.optim.Optimizer)
del OPTIMIZERS["Optimizer"]  # what they have in common
BASES = (DENSE, *exported(compressors, Compressor))
OPTIMIZERS["LBFGS"] = functools.partial(torch.optim.LBFGS, max_iter=2)
OPTIMIZERS["SGD"] = functools.partial(torch.optim.SGD, momentum=0.9)


@dataclass(frozen=True)
class Cell:
    """One composition, by names.

    Args:
        adapter: from :mod:`rankwise.adapters`.
        variant: the field that is not as usual, such as ``magnitudes``.
        start: from :mod:`rankwise.initialisers`; empty for the usual one.
        ranks: from :mod:`rankwise.rank_rules`; empty for equal ranks.
        base: what the matrices are: dense, or made by one of :mod:`rankwise.compressors`.
        optimizer: from :mod:`torch.optim`.
    """

    adapter: str
    variant: str = PLAIN
    start: str = PLAIN
    ranks: str = PLAIN
    base: str = DENSE
    optimizer: str = USUAL

    @property
    def row(self) -> str:
        """The adapter and its variant."""
        return f"{self.adapter}({self.variant})" if self.variant else self.adapter

    def method(self) -> Adapter | BlockAdapter:
        """Make the adapter."""
        kind, values = ADAPTERS[self.adapter], {}
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if "rank" in fields and issubclass(kind, Adapter):
            values["rank"] = RANK
        if self.variant:
            values[self.variant] = not fields[self.variant].default
            values |= {"alpha": float(RANK)} if "alpha" in fields else {}
        if self.start:
            values["start"] = STARTS[self.start]()
        if self.ranks:
            values["ranks"] = RULES[self.ranks]()
        return kind(**values)

    def adapted(self) -> nn.Module:
        """Make the network with the adapter."""
        model, method = network(self.base), self.method()
        if isinstance(method, BlockAdapter):
            rankwise.adapt(model, method)
        else:
            rules = method.ranks.needs if method.ranks else ()
            data = statistics(self.base, tuple(dict.fromkeys((*method.needs, *rules))))
            rankwise.adapt(model, method, data=data)
        return model

    def train(self, model: nn.Module, steps: int, rate: float = 1.0) -> tuple[list[float], Follower | None]:
        """Train the network at a multiple of the optimiser's usual learning rate.

        Returns:
            the losses before each step and after the last, and what followed it.
        """
        optimizer = OPTIMIZERS[self.optimizer]([p for p in model.parameters() if p.requires_grad])
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr"]
        scheduled = any(isinstance(part, Scheduled) for part in model.modules())
        follower = rankwise.follow(model, optimizer, steps=steps) if scheduled else None
        losses, x = [], batch()

        def closure() -> Tensor:
            optimizer.zero_grad()
            torch.manual_seed(0)  # the same dropout in all steps
            loss = loss_of(model(x), x)
            loss.backward()
            return loss

        for _ in range(steps):
            if self.optimizer == "LBFGS":
                losses.append(float(optimizer.step(closure).detach()))
            else:
                losses.append(float(closure().detach()))
                optimizer.step()
        return [*losses, float(closure().detach())], follower


@functools.cache
def _network(base: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    if base != DENSE:
        method: Compressor = getattr(compressors, base)()
        data = statistics(DENSE, method.needs) if method.needs else None
        rankwise.compress(model, method, keep=KEEP, of="bytes", allocate=rankwise.allocators.uniform, data=data)
    return model.eval()


def network(base: str) -> nn.Module:
    """The network, whose matrices may be compressed, in evaluation mode."""
    return copy.deepcopy(_network(base))


@functools.cache
def statistics(base: str, needs: tuple[type, ...]) -> Any:
    """What calibration finds, or None where nothing is needed."""
    if not needs:
        return None
    return rankwise.calibrate(network(base), needs, data=[batch()], labels=loss_of, compressed=True)


def variants(kind: type) -> list[str]:
    """The fields of a method that are true or false."""
    return [field.name for field in dataclasses.fields(kind) if isinstance(field.default, bool)]


def compositions(kind: type) -> Iterator[dict[str, str]]:
    """All variants of an adapter with all its starts and rank rules."""
    fields = {field.name for field in dataclasses.fields(kind)}
    starts = [PLAIN, *STARTS] if "start" in fields else [PLAIN]
    rules = [PLAIN, *RULES] if "ranks" in fields else [PLAIN]
    for variant, start, ranks in itertools.product([PLAIN, *variants(kind)], starts, rules):
        yield {"variant": variant, "start": start, "ranks": ranks}


def cells() -> list[Cell]:
    """All compositions of an adapter's own parts, and each adapter with each base and each optimiser."""
    own = [Cell(name, **parts) for name, kind in ADAPTERS.items() for parts in compositions(kind)]
    bases = [Cell(name, base=base) for name in ADAPTERS for base in BASES if base != DENSE]
    optimizers = [Cell(name, optimizer=each) for name in ADAPTERS for each in OPTIMIZERS if each != USUAL]
    return [*own, *bases, *optimizers]


def every() -> list[Cell]:
    """The whole product of all parts."""
    return [
        Cell(name, base=base, optimizer=optimizer, **parts)
        for name, kind in ADAPTERS.items()
        for parts in compositions(kind)
        for base in BASES
        for optimizer in OPTIMIZERS
    ]


def refusal(cell: Cell) -> str | None:
    """Return why a composition is refused, or None."""
    try:
        cell.train(cell.adapted().train(), 1)
    except REFUSALS as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """The text of an error without sizes."""
    return re.sub(r"torch\.Size\(.*?\)", "...", str(error))


def page(outcomes: Mapping[Cell, str | None]) -> str:
    """Return the text of docs/compositions.md."""
    refused = sum(why is not None for why in outcomes.values())
    head = (
        "Made by `docs/compositions.py`, which tries each composition on a small network. All that are marked + "
        "begin as the base, learn, leave it as it is, and are saved, loaded and folded "
        "(`tests/contracts/test_compositions.py`); a number is the reason of a refusal. In brackets stands the "
        f"field that is not as usual. {len(outcomes)} compositions were tried, of which {refused} are refused."
    )
    return "\n\n".join(["# Compositions", head, *(section(part, outcomes) for part in SECTIONS)]) + "\n"


def section(part: str, outcomes: Mapping[Cell, str | None]) -> str:
    """Return the table of one part: whether adapters go with its values, in all compositions that have both."""
    title, words = SECTIONS[part]
    usual = getattr(Cell(""), part)
    found: dict[str, dict[str, set[str | None]]] = {}
    for cell, why in outcomes.items():
        if (value := getattr(cell, part)) != usual or (part in ("base", "optimizer") and is_plain(cell)):
            found.setdefault(cell.row, {}).setdefault(value, set()).add(why)
    columns = list(dict.fromkeys(value for row in found.values() for value in row))
    notes: list[str] = []
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, values in found.items():
        lines.append(f"| {row} | " + " | ".join(_entry(values[column], notes) for column in columns) + " |")
    return "\n\n".join([f"## {title}", words, "\n".join(lines), *(f"{i}. {n}" for i, n in enumerate(notes, 1))])


def is_plain(cell: Cell) -> bool:
    """Whether it is an adapter as it is by default."""
    return cell == Cell(cell.adapter)


def _entry(reasons: set[str | None], notes: list[str]) -> str:
    """A plus, or the numbers of the reasons."""
    found = sorted(why for why in reasons if why is not None)
    notes.extend(why for why in found if why not in notes)
    return ", ".join([*(["+"] if None in reasons else []), *(str(notes.index(why) + 1) for why in found)])


if __name__ == "__main__":
    TARGET.write_text(page({cell: refusal(cell) for cell in cells()}), encoding="utf-8")
