"""What every exported adapter promises beside another one around the same matrices."""

import copy
from pathlib import Path

import pytest
import torch
from contracts.examples import draw
from contracts.test_adapters import NAMES, SETTINGS, batches, moved, net, toward_zero
from torch import nn

import rankwise
from rankwise.adapters import Householder, Lora
from rankwise.core.adapted import adapted
from rankwise.core.methods import Adapter
from rankwise.matrices import Several

OTHERS = {"sum": Lora(rank=2), "rows": Lora(rank=2, magnitudes=True), "product": Householder(rank=2)}


@pytest.fixture(params=NAMES)
def method(request: pytest.FixtureRequest) -> Adapter:
    return SETTINGS[request.param][0]


def put(model: nn.Module, method: Adapter, name: str | None = None) -> nn.Module:
    """The model with an adapter that has been trained."""
    rankwise.adapt(model, method, name=name, data=batches(), labels=toward_zero)
    for layer in adapted(model).values():
        moved(layer.matrix)
    return model


def both(method: Adapter, other: Adapter) -> nn.Module:
    return put(put(net(), method, "one"), other, "two")


def severals(model: nn.Module) -> list[Several]:
    return [part for part in model.modules() if isinstance(part, Several)]


@pytest.mark.parametrize("other", OTHERS)
def test_each_alone_is_the_model_with_that_one_alone(method: Adapter, other: str):
    model, x = both(method, OTHERS[other]), draw(3, 8, seed=9)
    for name, single in (("one", method), ("two", OTHERS[other])):
        rankwise.use(model, name)
        assert torch.equal(model(x), put(net(), single)(x))
    rankwise.use(model, None)
    assert torch.equal(model(x), net()(x))


@pytest.mark.parametrize("other", OTHERS)
def test_a_weighted_sum_is_that_of_the_changes(method: Adapter, other: str):
    model = both(method, OTHERS[other])
    rankwise.use(model, {"one": 0.7, "two": -1.6})
    for several in severals(model):
        base, (one, two) = several.base.dense(), (e.dense() for e in several.adapters.values())
        wanted = base + 0.7 * (one - base) - 1.6 * (two - base)
        (m, n), close = several.shape, {"rtol": 1e-12, "atol": 1e-12}
        x, y = draw(2, 3, n, seed=5), draw(3, m, seed=6)
        torch.testing.assert_close(several.dense(), wanted, **close)
        torch.testing.assert_close(several(x), x @ wanted.mT, **close)
        torch.testing.assert_close(several.adjoint(y), y @ wanted, **close)
        torch.testing.assert_close(several.lookup(torch.arange(n)), wanted.mT, **close)


@pytest.mark.parametrize("other", OTHERS)
def test_rows_are_computed_as_one_by_one(method: Adapter, other: str):
    model, x = both(method, OTHERS[other]), draw(6, 3, 8, seed=9)
    choice = ["two", None, "one", {"one": 0.5, "two": 2.0}, "one", {"one": 0.5, "two": 2.0}]
    wanted = []
    for each, row in zip(choice, x, strict=True):
        with rankwise.use(model, each):
            wanted.append(model(row[None])[0])
    with rankwise.use(model, choice):
        found = model(x)
        looked_up = severals(model)[0].lookup(torch.arange(8).repeat(6, 1))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    for each, columns in zip(choice, looked_up, strict=True):
        with rankwise.use(model, each):
            torch.testing.assert_close(columns, severals(model)[0].dense().mT, rtol=1e-12, atol=1e-12)


def test_what_is_in_use_trains_alone(method: Adapter):
    model = both(method, Lora(rank=2))
    other = {name for name, p in model.named_parameters() if p.requires_grad}
    rankwise.use(model, "one")
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    alone = [p.shape for p in put(net(), method).parameters() if p.requires_grad]
    assert [p.shape for p in model.parameters() if p.requires_grad] == alone
    assert other
    assert not own & other
    model(draw(3, 8)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= own
    rankwise.use(model, {"one": 0.5, "two": 0.5})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own | other
    rankwise.use(model, None)
    assert not any(p.requires_grad for p in model.parameters())
    rankwise.use(model, "one")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own


def test_each_is_written_and_read_by_name(method: Adapter, tmp_path: Path):
    model, again, x = both(method, Lora(rank=3)), net(), draw(3, 8, seed=9)
    for name in ("one", "two"):
        rankwise.save(model, tmp_path / name, format="rankwise", name=name)
        rankwise.load_adapter(again, tmp_path / name, name=f"{name} again")
        rankwise.use(model, name)
        assert torch.equal(again(x), model(x))
        flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == flags
    assert list(rankwise.adapters_of(again)) == ["one again", "two again"]
    alone = net()
    rankwise.load_adapter(alone, tmp_path / "one")
    assert torch.equal(alone(x), put(net(), method)(x))


def test_a_sum_is_written_as_one_adapter_and_folded(method: Adapter, tmp_path: Path):
    model, again, x = both(method, Householder(rank=2)), net(), draw(3, 8, seed=9)
    rankwise.use(model, {"one": 0.7, "two": 0.3})
    rankwise.save(model, tmp_path / "sum", format="rankwise")
    rankwise.load_adapter(again, tmp_path / "sum")
    y = model(x)
    torch.testing.assert_close(again(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rankwise.fold(copy.deepcopy(model))(x), y, rtol=1e-12, atol=1e-12)


def test_removing_leaves_the_other_and_then_the_model(method: Adapter):
    model, x = both(method, Lora(rank=2)), draw(3, 8, seed=9)
    rankwise.remove_adapter(model, "one")
    assert torch.equal(model(x), put(net(), Lora(rank=2))(x))
    rankwise.remove_adapter(model, "two")
    assert torch.equal(model(x), net()(x))
    assert [type(layer) for layer in model] == [type(layer) for layer in net()]


@pytest.mark.slow
@pytest.mark.parametrize("choice", [{"one": 0.7, "two": 0.3}, ["two", None, "one"]], ids=["sum", "rows"])
def test_it_compiles_without_breaks(choice):
    torch.compiler.reset()
    model, x = both(Lora(rank=2, magnitudes=True), Householder(rank=2)), draw(3, 8, seed=5)
    rankwise.use(model, choice)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
