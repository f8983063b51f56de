"""What every exported rule of ranks promises."""

import inspect

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


def ranks(rule: RankRule) -> list[int]:
    """The ranks of the layers of a small network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    net[2].weight.data *= torch.logspace(0, -3, 16)  # layers of different spectra

    def toward_zero(output: Tensor, batch: Tensor, generator: Generator) -> Tensor:
        return output.square().sum()

    method = Lora(rank=RANK, ranks=rule)
    report = rankwise.adapt(net, method, data=[correlated(50, 9, 5)], labels=toward_zero)
    layers = rankwise.adapting.adapted(net)
    sizes = [sum(p.numel() for p in net[i].parameters() if p.requires_grad) for i in (0, 2, 4)]
    found = [row["rank"] for row in report.rows]
    assert sizes == [r * (a + b) for r, (a, b) in zip(found, [(9, 16), (16, 12), (12, 7)], strict=True)]
    assert [name in layers for name in ("0", "2", "4")] == [r > 0 for r in found]
    return found


def test_the_budget_is_met(rule: RankRule):
    found = ranks(rule)
    assert sum(found) == 3 * RANK
    assert max(found) <= rule.most * RANK
    assert len(set(found)) > 1  # the layers differ, and so do their ranks
    assert found == ranks(rule)


def test_equal_ranks_where_no_layer_may_have_more(rule: RankRule):
    values = {name: getattr(rule, name) for name in rule.__dataclass_fields__}  # pyright: ignore[reportAttributeAccessIssue]
    assert ranks(type(rule)(**{**values, "most": 1.0})) == [RANK] * 3
    with pytest.raises(ValueError, match="most"):
        type(rule)(**{**values, "most": 0.5})
