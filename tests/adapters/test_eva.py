"""The start at the principal components of the inputs, and the ranks that their variance gives."""

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill
from torch import Generator, Tensor, nn

import rankwise
from rankwise import CalibrationError
from rankwise.adapters import Eva
from rankwise.core.statistics import AnswerGram, InputGram
from rankwise.initialisers import PrincipalInputs
from rankwise.matrices import Dense


def start(x: Tensor, rank: int, **options) -> Tensor:
    """A (r, n), in float64."""
    method = PrincipalInputs(**options)
    stats = fill(method.needs, x, torch.zeros(len(x), 3))
    return method.factors(Dense(draw(3, x.shape[1])), rank, 1.0, stats, Generator())[1].double()


def known(matrix: nn.Module, rank: int) -> Tensor:
    """The trained A (r, n) of a layer whose output is no longer than its rank."""
    return next(p for p in matrix.parameters() if p.requires_grad and p.shape[0] == rank).detach()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_rows_are_the_leading_singular_vectors_of_the_inputs(centred: bool, whiten: bool):
    x = correlated(300, 10, 1) + 0.5 * draw(1, 10, seed=3)
    _, values, vectors = torch.linalg.svd(x - x.mean(0) * centred, full_matrices=False)
    rows = start(x, 4, centred=centred, whiten=whiten)
    if whiten:
        rows = rows * (values[:4, None] / 300**0.5)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.mT @ rows, vectors[:4].mT @ vectors[:4], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_whitening_does_not_amplify_what_the_data_do_not_vary_along(size: float):
    x = size * (draw(400, 3, seed=1) @ draw(3, 16, seed=2) + 5 * draw(1, 16, seed=3))
    rows = start(x, 5, whiten=True)
    torch.testing.assert_close((x @ rows[:3].mT).std(0, correction=0), torch.ones(3).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(rows[3:].norm(dim=1), rows[0].norm().expand(2))


@pytest.mark.parametrize("rows", [50, 5000])
def test_equal_inputs_have_no_components(rows: int):
    with pytest.raises(ValueError, match="do not vary"):
        start((7.3 * draw(1, 16)).repeat(rows, 1), 2)


def test_a_step_of_the_left_factor_is_that_of_the_whole_weight():
    """Where the inputs lie in the span of A."""
    x, target = (draw(60, 3, seed=1) @ draw(3, 8, seed=2)).float(), draw(60, 6, seed=3).float()
    whole = nn.Sequential(nn.Linear(8, 6))
    small = nn.Sequential(nn.Linear(8, 6))
    small.load_state_dict(whole.state_dict())
    rankwise.adapt(small, Eva(rank=3, most=1.0, centred=False), data=[x])
    left = next(p for p in small.parameters() if p.requires_grad and p.shape == (6, 3))
    for model, moved in ((whole, whole[0].weight), (small, left)):
        (model(x) - target).square().mean().backward()
        with torch.no_grad():
            moved -= 0.1 * moved.grad
    folded = rankwise.fold(small)[0].weight
    torch.testing.assert_close(folded, whole[0].weight, rtol=0, atol=1e-6)


class Two(nn.Module):
    """Two layers with one input, and one behind them; what else a batch holds is for others."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(24, 4)

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.out(torch.cat([self.query(x), self.key(x)], -1))


def test_layers_with_one_input_start_alike_and_ranks_add_up():
    model, x = Two(), correlated(200, 16, 1).float()
    rankwise.adapt(model, Eva(rank=3, most=1.0), data=[x])
    query, key = (known(layer, 3) for layer in (model.query, model.key))
    assert torch.equal(query, key)
    for rank in (1, 2, 4):
        report = rankwise.adapt(Two(), Eva(rank=rank), data=[x])
        assert sum(row["rank"] for row in report.rows) == 3 * rank
        assert report.totals["unspent"] == 0


def test_ranks_beyond_the_directions_of_the_inputs_are_left_over():
    x = (draw(200, 2, seed=1) @ draw(2, 16, seed=2) + draw(1, 16, seed=3)).float()
    report = rankwise.adapt(Two(), Eva(rank=4), data=[x])
    assert [row["rank"] for row in report.rows] == [2, 2, 2]
    assert report.totals["unspent"] == 6
    assert "6 ranks are left over" in report.title


def conversation(*, padding: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Prompts in the first eight dimensions, which have no label, then answers in the others; maybe padding."""
    x, labels = torch.zeros(4, 30, 16), torch.full((4, 30), -100)
    x[:, :20, :8], x[:, 20:, 8:] = 3 * draw(4, 20, 8).float(), draw(4, 10, 8, seed=1).float()
    labels[:, 20:] = 1
    if not padding:
        return x, {"x": x, "labels": labels}
    mask = torch.ones_like(labels)
    mask[:, 25:] = 0
    x[:, 25:, :8] = 50.0 * draw(4, 5, 8, seed=2).float()
    return x, {"x": x, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("padding", [False, True])
def test_tokens_without_a_label_do_not_count(padding: bool):
    for answers in (True, False):
        model = Two()
        rankwise.adapt(model, Eva(rank=4, most=1.0, answers=answers), data=[conversation(padding=padding)[1]])
        share = float(known(model.query, 4)[:, 8:].square().sum()) / 4
        assert share == pytest.approx(float(answers), abs=1e-3)


def test_other_statistics_count_all_tokens():
    x, batch = conversation(padding=False)
    for given, first in ((batch, 20), ({"x": x}, 0)):
        found = rankwise.calibrate(Two(), (InputGram, AnswerGram), data=[given]).layers["query"]
        for kind, rows in ((InputGram, x), (AnswerGram, x[:, first:])):
            rows = rows.flatten(0, 1).double()
            assert found[kind].count == len(rows)
            torch.testing.assert_close(found[kind].value(), rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_data_without_any_label_are_refused():
    batch = conversation(padding=False)[1]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(CalibrationError, match="label other than -100"):
        rankwise.adapt(Two(), Eva(rank=2), data=[batch])
