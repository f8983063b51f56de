"""What is particular to pruning by the gradients of batches."""

import copy
import itertools

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.compressors import MFacPruning
from rankwise.core import labels
from rankwise.core.statistics import BatchGradients, Stats
from rankwise.core.statistics_file import load_statistics, save_statistics
from rankwise.linalg import independent

DAMPING = 0.2


def gradients(k: int, m: int, n: int) -> Stats:
    statistic = BatchGradients(m, n)
    for i in range(k):
        statistic.begin(i)
        statistic.update(draw(3, n, seed=2 * i).float(), draw(3, m, seed=2 * i + 1).float())
    return {BatchGradients: statistic}


def blocks_of(stats: Stats, weight: Tensor, block: int) -> Tensor:
    """F (d, d), cut into blocks, of the weights that are not zero."""
    rows = (stats[BatchGradients].value() * (weight != 0)).flatten(1)
    damping = DAMPING * float(rows.square().mean(0).sum()) / int((weight != 0).sum())
    fisher = rows.mT @ rows / len(rows)
    number = torch.arange(weight.numel()) // block
    return fisher * (number[:, None] == number) + damping * torch.eye(len(number), dtype=torch.float64)


def restricted(weight: Tensor, fisher: Tensor, kept: Tensor) -> Tensor:
    """The weights (d,) of least damage that are zero outside a mask."""
    found, flat = torch.zeros(weight.numel(), dtype=torch.float64), weight.flatten()
    found[kept] = torch.linalg.solve(fisher[kept][:, kept], (fisher @ flat)[kept])
    return found


@pytest.mark.parametrize("block", [1, 5, 8, 10**6])
def test_it_drops_the_least_saliency_and_fits_the_rest(block: int):
    weight, stats = draw(6, 8), gradients(7, 6, 8)
    weight[1, 2:5] = 0
    fisher = blocks_of(stats, weight, block)
    score = weight.flatten().square() / torch.linalg.inv(fisher).diagonal()
    choices = MFacPruning(damping=DAMPING, block=block).choices(weight, stats)
    for i, count in enumerate(choices.costs["macs"].tolist()):
        kept = torch.zeros(48, dtype=torch.bool)
        kept[score.topk(count).indices] = True
        wanted = restricted(weight, fisher, kept)
        torch.testing.assert_close(choices.build(i).dense().flatten(), wanted, rtol=1e-8, atol=1e-9)
        change = wanted - weight.flatten()
        assert float(choices.errors[i]) == pytest.approx(float(change @ fisher @ change) / 2, rel=1e-9, abs=1e-12)
    assert int(choices.costs["macs"][-1]) == 45  # what is zero need not be kept
    assert float(choices.errors[-1]) == 0


def test_one_by_one_does_more_damage():
    weight, stats = draw(6, 8), gradients(20, 6, 8)
    one, other = MFacPruning(density=0.5), MFacPruning(density=0.5, update=independent)
    grouped, independently = (method.choices(weight, stats) for method in (one, other))
    damages = [
        choices.error_of(weight - choices.build(0).dense().detach()) for choices in (grouped, independently)
    ]
    assert damages[0] == pytest.approx(float(grouped.errors[0]))
    assert damages[0] < 0.95 * damages[1]


class Twice(nn.Module):
    """A convolution that is called twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.out(torch.tanh(self.conv(torch.tanh(self.conv(x)))).flatten(1))


def problem(count: int = 12) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    return Twice(), [(torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5,))) for _ in range(count)]


def test_the_statistic_is_the_gradient_of_each_batch(tmp_path):
    model, data = problem(4)
    found = rankwise.calibrate(model, [BatchGradients], data=data, labels=labels.given)
    for i, (x, y) in enumerate(data):
        model.zero_grad()
        functional.cross_entropy(model(x), y, reduction="sum").backward()
        for name in ("conv", "out"):
            weight = model.get_submodule(name).weight
            given = found.layers[name][BatchGradients].value()
            assert len(given) == 4
            torch.testing.assert_close(given[i], weight.grad.flatten(1).double(), rtol=1e-5, atol=1e-6)
    save_statistics(found, tmp_path / "gradients.safetensors", model)
    again = load_statistics(tmp_path / "gradients.safetensors", model)
    assert torch.equal(again.layers["out"][BatchGradients].value(), found.layers["out"][BatchGradients].value())


def test_a_layer_that_a_batch_does_not_reach_has_a_gradient_of_zero():
    statistic = BatchGradients(2, 3)
    statistic.begin(1)
    statistic.update(torch.ones(1, 3), torch.ones(1, 2))
    statistic.begin(3)
    assert statistic.value().sum((1, 2)).tolist() == [0.0, 6.0, 0.0, 0.0]


def loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return float(sum(functional.cross_entropy(model(x), y) for x, y in data)) / len(data)


def test_rounds_with_new_gradients_do_less_harm_than_one():
    model, data = problem(24)
    data = [(x, (x.mean((1, 2, 3)) * 9).round().long().clamp(-1, 1) + 1) for x, _ in data]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(10):
        for x, y in data:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    before, found = loss(model, data), {}
    for rounds in (1, 8):
        pruned = copy.deepcopy(model)
        how = {"data": data, "labels": labels.given, "of": "macs"}
        report = rankwise.compress_gradually(pruned, MFacPruning(), keep=0.3, rounds=rounds, **how)
        assert report.totals["keep"]["macs"] <= 0.3
        assert {row["kind"] for row in report.rows} == {"Sparse"}
        found[rounds] = loss(pruned, data)
    assert before < found[8] < 0.9 * found[1]


def test_zeros_stay_zero_through_the_rounds_and_training_between_them():
    model, data = problem()
    masks: list[Tensor] = []

    def between(ordinary: nn.Module) -> None:
        weight = ordinary.get_submodule("out").weight
        masks.append(weight.detach() == 0)
        with torch.no_grad():
            weight *= 1.5

    rankwise.compress_gradually(model, MFacPruning(), keep=0.2, rounds=4, data=data, of="macs", between=between)
    last = model.get_submodule("out").matrix.dense() == 0
    masks.append(last)
    assert len(masks) == 4
    for earlier, later in itertools.pairwise(masks):
        assert bool(later[earlier].all())
        assert int(later.sum()) > int(earlier.sum())


def test_rounds_need_data_that_can_be_read_again():
    model, data = problem(2)
    statistics = rankwise.calibrate(model, [BatchGradients], data=data)
    with pytest.raises(ValueError, match="give the data"):
        rankwise.compress_gradually(model, MFacPruning(), keep=0.5, data=statistics)
    with pytest.raises(ValueError, match="give a list of batches"):
        rankwise.compress_gradually(model, MFacPruning(), keep=0.5, data=iter(data))
    with pytest.raises(ValueError, match="keep must be"):
        rankwise.compress_gradually(model, MFacPruning(), keep=1.0, data=data)
    with pytest.raises(ValueError, match="rounds must be"):
        rankwise.compress_gradually(model, MFacPruning(), keep=0.5, rounds=0, data=data)


def test_layers_without_any_gradient_are_refused():
    stats = gradients(2, 3, 4)
    stats[BatchGradients].sum.zero_()
    with pytest.raises(ValueError, match="gradients are zero"):
        MFacPruning().choices(draw(3, 4), stats)
