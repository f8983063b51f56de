"""What every exported rule of ranks promises."""

import inspect
import itertools
from typing import Any

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill
from torch import Generator, Tensor, nn

import rankwise
from rankwise import rank_rules
from rankwise.adapters import Lora
from rankwise.core.methods import RankRule
from rankwise.matrices import Dense, LowRank, StructuredMatrix

SETTINGS: dict[str, list[RankRule]] = {
    "ExplainedVariance": [rank_rules.ExplainedVariance(), rank_rules.ExplainedVariance(centred=False)],
    "PredictedDecrease": [
        rank_rules.PredictedDecrease(),
        rank_rules.PredictedDecrease(input_damping=1.0, output_damping=1.0),
    ],
    "SpectralEnergy": [rank_rules.SpectralEnergy()],
}
NAMES = [name for name in rank_rules.__all__ if inspect.isclass(getattr(rank_rules, name))]
BASES = {"square": Dense(draw(12, 12)), "wide": Dense(draw(6, 17)), "low rank": LowRank(draw(12, 5), draw(5, 8))}
RANK = 3


@pytest.fixture(params=[(name, i) for name in NAMES for i in range(len(SETTINGS.get(name, [None])))], ids=str)
def rule(request: pytest.FixtureRequest) -> RankRule:
    name, i = request.param
    if name not in SETTINGS:
        pytest.fail(f"{name} is exported but tests/contracts/test_rank_rules.py has no settings of it.")
    return SETTINGS[name][i]


@pytest.mark.parametrize("base", sorted(BASES))
def test_what_is_missed_never_increases(rule: RankRule, base: str):
    matrix: StructuredMatrix = BASES[base]
    m, n = matrix.shape
    stats = fill(rule.needs, correlated(60, n, 3), correlated(60, m, 4))
    for count in (1, min(m, n)):
        missed = rule.missed(matrix, stats, count)
        assert missed.shape == (count + 1,)
        assert bool(missed.isfinite().all())
        assert float(missed[0]) > 0
        assert bool((missed[1:] <= missed[:-1]).all())


def net() -> nn.Sequential:
    """Three layers of different spectra."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    made[2].weight.data *= torch.logspace(0, -3, 16)
    return made


def toward_zero(output: Tensor, batch: Tensor, generator: Generator) -> Tensor:
    return output.square().sum()


DATA: Any = {"data": [correlated(50, 9, 5)], "labels": toward_zero}


def ranks(rule: RankRule) -> list[int]:
    """The ranks of the layers of the network."""
    model = net()
    report = rankwise.adapt(model, Lora(rank=RANK, ranks=rule), **DATA)
    layers = rankwise.core.adapted.adapted(model)
    sizes = [sum(p.numel() for p in model[i].parameters() if p.requires_grad) for i in (0, 2, 4)]
    found = [row["rank"] for row in report.rows]
    assert sizes == [r * (a + b) for r, (a, b) in zip(found, [(9, 16), (16, 12), (12, 7)], strict=True)]
    assert [name in layers for name in ("0", "2", "4")] == [r > 0 for r in found]
    return found


def test_the_budget_is_met_in_the_best_of_all_ways(rule: RankRule):
    found, model = ranks(rule), net()
    assert sum(found) == 3 * RANK
    assert found == ranks(rule)
    most = int(rule.most * RANK)
    stats = rankwise.calibrate(model, rule.needs, **DATA).layers if rule.needs else {name: {} for name in "024"}
    missed = [rule.missed(Dense(model[i].weight.detach()), stats[str(i)], most).tolist() for i in (0, 2, 4)]
    ways = [way for way in itertools.product(range(most + 1), repeat=3) if sum(way) == 3 * RANK]
    values = {way: sum(left[r] for left, r in zip(missed, way, strict=True)) for way in ways}
    assert values[tuple(found)] == pytest.approx(min(values.values()))
    assert max(values.values()) > 1.1 * min(values.values())  # it matters which way


def test_equal_ranks_where_no_layer_may_have_more(rule: RankRule):
    values = {name: getattr(rule, name) for name in rule.__dataclass_fields__}  # pyright: ignore[reportAttributeAccessIssue]
    assert ranks(type(rule)(**{**values, "most": 1.0})) == [RANK] * 3
    with pytest.raises(ValueError, match="most"):
        type(rule)(**{**values, "most": 0.5})
