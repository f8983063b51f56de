"""Ranks of any adapter that has one are spread by a rule."""

import inspect
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor, nn

import rankwise
from rankwise import adapters
from rankwise.core.adapted import adapted
from rankwise.core.methods import Ranked
from rankwise.initialisers import GradientSvd
from rankwise.matrices import Branch
from rankwise.rank_rules import SpectralEnergy

KINDS: dict[str, Any] = {
    name: kind
    for name in adapters.__all__
    if inspect.isclass(kind := getattr(adapters, name)) and issubclass(kind, Ranked)
}
RANK = 4


def net() -> nn.Sequential:
    """Two layers, of which the first has a flat spectrum and the second a steep one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    model[2].weight.data *= torch.logspace(0, -3, 32)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_the_flat_layer_gets_more_of_the_same_budget(name: str):
    method = KINDS[name](rank=RANK, ranks=SpectralEnergy())
    first, second = (row["rank"] for row in rankwise.adapt(net(), method).rows)
    assert first + second == 2 * RANK
    assert first > RANK > second > 0
    assert first % method.step == second % method.step == 0


@pytest.mark.parametrize("name", ["Lamda", "Loldu", "Lora", "Pissa"])
def test_layers_of_other_ranks_keep_the_scale(name: str):
    model = net()
    rankwise.adapt(model, KINDS[name](rank=RANK, alpha=3.0, ranks=SpectralEnergy()))
    scales = [m.scale for layer in adapted(model).values() for m in layer.modules() if isinstance(m, Branch)]
    assert scales == pytest.approx([3.0 / RANK] * 2)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_rule_is_refused(name: str):
    with pytest.raises(TypeError, match="ranks must be an object"):
        KINDS[name](rank=RANK, ranks="energy")


def test_a_share_of_the_spectrum_is_no_rank_to_spread():
    with pytest.raises(ValueError, match="whose average is rank"):
        adapters.Svfit(ranks=SpectralEnergy())


def squares(output: Tensor, batch: Tensor, generator: Generator) -> Tensor:
    """A loss for outputs that are no logits."""
    return output.square().sum()


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (adapters.KronLora(count=4, rank=7, ranks=SpectralEnergy()), 8),
        (adapters.Sst(rank=7, components=8, ranks=SpectralEnergy()), 8),
        (adapters.Lora(rank=14, start=GradientSvd(), ranks=SpectralEnergy()), 16),
        (adapters.GradNormLorp(rank=14, start=GradientSvd(), ranks=SpectralEnergy()), 16),
    ],
    ids=lambda each: type(each).__name__,
)
def test_no_layer_gets_more_than_the_adapter_can_take(method: Ranked, most: int):
    report = rankwise.adapt(net(), method, data=[draw(40, 32, dtype=torch.float32)], labels=squares)
    first, second = (row["rank"] for row in report.rows)
    assert not report.totals["left_out"]
    assert first == most
    assert first + second == 2 * getattr(method, "rank", 0)


@pytest.mark.parametrize(
    "method",
    [
        adapters.Lora(rank=8, start=GradientSvd()),
        adapters.Lora(rank=8, start=GradientSvd(), ranks=SpectralEnergy()),
        adapters.KronLora(count=2, rank=8, ranks=SpectralEnergy()),
        adapters.Sst(rank=8, components=12, ranks=SpectralEnergy()),
    ],
    ids=lambda each: f"{type(each).__name__} {each.ranks}",
)
def test_a_layer_too_small_for_the_adapter_takes_no_ranks_from_others(method: Ranked):
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    report = rankwise.adapt(model, method, data=[draw(40, 32, dtype=torch.float32)], labels=squares)
    assert list(report.totals["left_out"]) == ["2"]
    assert [(row["name"], row["rank"]) for row in report.rows] == [("0", 8)]
