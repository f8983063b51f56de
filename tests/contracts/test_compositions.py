"""What adapters promise in every composition with starts, rank rules, bases and optimisers."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_docs import script
from torch import Generator, Tensor, nn

import rankwise
from rankwise.adapters import Lora
from rankwise.core.extended import extended
from rankwise.core.statistics import Stats
from rankwise.core.surgery import base_of, select
from rankwise.matrices import Base, StructuredMatrix

compositions = script("compositions")
Cell, CELLS = compositions.Cell, compositions.cells()
STEPS, SAMPLE = 4, 200
RATES = (1.0, 0.03, 30.0, 1000.0)  # of an optimiser's usual learning rate: with one of them the loss falls
QUICK = (compositions.DENSE, "KroneckerFactoredSvd", "Gptq")  # bases: dense, of low rank, of few bits
DEMANDS = {  # what parts ask of the others
    "FactorLora": "has no factors",
    "LBFGS": "no closure",
    "Muon": "only supports 2D",
    "SparseAdam": "not support dense gradients",
}
OUTCOMES: dict[Cell, str | None] = {}  # why each was refused, or None if it was not


def marked(cell: Cell):
    slow = cell.base not in QUICK or all((cell.variant, cell.start, cell.ranks))
    return pytest.param(cell, marks=pytest.mark.slow if slow else [], id=name_of(cell))


def name_of(cell: Cell) -> str:
    return " ".join(filter(None, (cell.row, cell.start, cell.ranks, cell.base, cell.optimizer)))


def bases(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What is stored of the matrices that adapters change or stand behind."""
    found = {}
    for name, site in select(model, compressed=True).items():
        matrix = base_of(site.matrix)
        found[name.removesuffix(".layer")] = (matrix.matrix if matrix is not None else site.matrix).state_dict()
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def check(cell: Cell, folder: Path) -> None:
    """Adapt, train, save, load and fold.

    Raises:
        ValueError: if the composition is refused.
        RuntimeError: if an optimiser of torch refuses it.
    """
    x, plain = compositions.batch(), compositions.network(cell.base)
    start = plain(x).detach()
    for rate in RATES:
        model = cell.adapted()
        torch.testing.assert_close(model(x), start, rtol=1e-5, atol=1e-5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        losses, follower = cell.train(model.train(), STEPS, rate)
        if losses[-1] < losses[0]:
            break
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= trained
    now, then = bases(model), bases(plain)
    assert now.keys() == then.keys()
    assert all(same(state, then[name]) for name, state in now.items())

    output = model.eval()(x).detach()
    assert not torch.equal(output, start)
    rankwise.save(model, folder, format="rankwise")
    again = compositions.network(cell.base)
    rankwise.load_adapter(again, folder)
    assert torch.equal(again(x), output)
    if extended(model):
        with pytest.raises(ValueError, match="cannot be folded"):
            rankwise.fold(model)
        return

    if follower is not None:
        follower.finish()
    rankwise.fold(model)
    assert all(type(layer) is nn.Linear for layer in (model.blocks[0].up, model.blocks[0].down))
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-4)


def outcome(cell: Cell, folder: Path) -> str | None:
    try:
        check(cell, folder)
    except compositions.REFUSALS as error:
        return compositions.reason(error)
    return None


def wrong(cell: Cell, why: str | None) -> bool:
    """Whether a composition was refused that has no reason to be."""
    demands = [DEMANDS[part] for part in (cell.adapter, cell.optimizer) if part in DEMANDS]
    return why is not None and not any(demand in why for demand in demands)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [marked(cell) for cell in CELLS])
def test_parts_compose(cell: Cell, tmp_path: Path):
    OUTCOMES[cell] = outcome(cell, tmp_path / "adapter")
    assert not wrong(cell, OUTCOMES[cell]), OUTCOMES[cell]


@dataclass(frozen=True, kw_only=True)
class WritesIntoTheBase(Lora):
    """Wrong: what is added stays in the base."""

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        base.matrix.weight.data += 1e-7
        return super().attach(base, stats, generator)


@dataclass(frozen=True, kw_only=True)
class TurnsGradients(Lora):
    """Wrong: it learns the opposite."""

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        made = super().attach(base, stats, generator)
        for p in made.parameters():
            if p.requires_grad:
                p.register_hook(lambda gradient: -gradient)
        return made


@dataclass(frozen=True, kw_only=True)
class StartsElsewhere(Lora):
    """Wrong: it is not the base at the start."""

    def attach(self, base: Base, stats: Stats, generator: Generator) -> StructuredMatrix:
        made = super().attach(base, stats, generator)
        made.members[1].matrix.left.data.fill_(0.01)
        return made


@pytest.mark.parametrize("kind", [StartsElsewhere, TurnsGradients, WritesIntoTheBase])
def test_wrong_adapters_are_found(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(compositions.ADAPTERS, kind.__name__, kind)
    with pytest.raises(AssertionError):
        check(Cell(kind.__name__), tmp_path / "adapter")


@pytest.mark.slow
def test_a_sample_of_the_whole_product(tmp_path: Path):
    cells = random.Random(0).sample(compositions.every(), SAMPLE)
    found = {cell: outcome(cell, tmp_path / str(i)) for i, cell in enumerate(cells)}
    assert {name_of(cell): why for cell, why in found.items() if wrong(cell, why)} == {}
    assert sum(why is None for why in found.values()) > SAMPLE / 2


def test_there_are_many_compositions():
    assert len(CELLS) == len(set(CELLS)) > 500
    assert {cell.adapter for cell in CELLS} == {
        name for name in rankwise.adapters.__all__ if name in compositions.ADAPTERS
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", compositions.SECTIONS)
def test_the_page_is_current(part: str):
    """Where tests of the cells ran before, their outcomes are taken."""
    text = compositions.TARGET.read_text(encoding="utf-8")
    known = text.partition("## Optimisers")[2].split("\n")[4].strip("| ").split(" | ")
    if not set(known) <= set(compositions.OPTIMIZERS):
        pytest.skip("the page was made with a newer torch")
    cells = [cell for cell in CELLS if part == "base" or cell.base == compositions.DENSE]
    found = {cell: OUTCOMES[cell] if cell in OUTCOMES else compositions.refusal(cell) for cell in cells}
    assert compositions.section(part, found) in text, "run: python docs/compositions.py"
    if part == "base":
        assert text == compositions.page(found)
