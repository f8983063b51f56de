"""Ranks of any adapter that has one are spread by a rule."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import rankwise
from rankwise import adapters
from rankwise.core.adapted import adapted
from rankwise.core.methods import Ranked
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
