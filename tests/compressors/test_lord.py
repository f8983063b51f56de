"""Centred outputs, and the bias that keeps their mean."""

import copy

import pytest
import tiny
import torch
from contracts.examples import draw
from contracts.problems import correlated, exactly, fill
from torch import Tensor, nn

import rankwise
from rankwise.adapters import Lora
from rankwise.compressors import Lord, WhitenedSvd
from rankwise.core.adapted import adapted
from rankwise.core.choices import Choices
from rankwise.core.statistics import InputGram, InputMean
from rankwise.core.surgery import structured

WEIGHT = draw(14, 9)


def inputs(mean: float) -> Tensor:
    x = correlated(500, 9, 1)
    return x - x.mean(0) + mean * draw(1, 9, seed=3)


def offers(x: Tensor) -> tuple[Choices, Choices]:
    grad = torch.zeros(len(x), 14, dtype=torch.float64)
    lord, whitened = Lord(damping=1e-9), WhitenedSvd(damping=1e-9)
    return tuple(method.choices(WEIGHT, fill(method.needs, x, grad)) for method in (lord, whitened))  # pyright: ignore[reportReturnType]


def left_out(x: Tensor, matrix: Tensor, mean: Tensor | None) -> float:
    """Mean squared error of the outputs, with the bias that the method adds."""
    error = x @ (WEIGHT - matrix).mT
    return float((error if mean is None else error - (WEIGHT - matrix) @ mean).square().sum(1).mean())


@pytest.mark.parametrize("mean", [0.3, 3.0])
def test_the_error_is_the_lost_variance_and_less_than_without_centring(mean: float):
    x = inputs(mean)
    centred, plain = offers(x)
    covariance = torch.cov((x @ WEIGHT.mT).mT, correction=0)  # of the outputs, as the paper has it
    energies = torch.linalg.eigvalsh(covariance).flip(0)
    small = 1e-6 * plain.total  # sums are float32, and the mean cancels
    for i in range(8):
        error = left_out(x, centred.build(i).dense().detach(), centred.mean)
        assert error == pytest.approx(float(energies[i + 1 :].sum()), rel=1e-3, abs=small)
        assert error == pytest.approx(float(centred.errors[i]), rel=1e-3, abs=small)
        assert error <= left_out(x, plain.build(i).dense().detach(), None) * (1 + 1e-3) + small


@pytest.mark.parametrize("mean", [300.0, 1000.0])
def test_a_large_mean_does_not_damp(mean: float):
    """With the default damping, against the least variance that a rank can leave; sums are exact."""
    x = draw(2000, 9, seed=1) + mean * draw(1, 9, seed=3)
    stats = {InputGram: exactly(InputGram, x.mT @ x / 2000), InputMean: exactly(InputMean, x.mean(0))}
    choices = Lord().choices(WEIGHT, stats)
    energies = torch.linalg.eigvalsh(torch.cov((x @ WEIGHT.mT).mT, correction=0)).flip(0)
    for i in range(7):
        error, best = left_out(x, choices.build(i).dense().detach(), choices.mean), float(energies[i + 1 :].sum())
        assert error == pytest.approx(best, rel=1e-4)
        assert float(choices.errors[i]) == pytest.approx(error, rel=1e-3)


def test_equal_inputs_have_no_error():
    x = inputs(2.0)[:1].repeat(50, 1)
    assert float(Lord().choices(WEIGHT, fill(Lord.needs, x, torch.zeros(50, 14))).errors[0]) < 1e-3


def test_inputs_without_a_mean_give_whitened_svd():
    centred, plain = offers(inputs(0.0))
    torch.testing.assert_close(centred.errors, plain.errors, rtol=1e-4, atol=1e-6 * plain.total)
    torch.testing.assert_close(centred.build(3).dense(), plain.build(3).dense(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_of_the_outputs_stays(bias: bool):
    x = inputs(2.0)
    model = nn.Sequential(nn.Linear(9, 14, bias=bias)).double()
    before = model(x).mean(0)
    report = rankwise.compress(model, Lord(), keep=0.6, data=[x])
    torch.testing.assert_close(model(x).mean(0), before, rtol=1e-5, atol=1e-5)
    layer = structured(model)["0"]
    added = 0 if bias else 14
    assert layer.biased is not bias
    assert report.rows[0]["params_after"] == layer.matrix.params + added
    assert report.totals["keep"]["params"] == (layer.matrix.params + added) / (9 * 14) <= 0.6


def test_full_rank_reproduces_the_outputs():
    x = inputs(2.0)
    centred, _ = offers(x)
    assert left_out(x, centred.build(8).dense().detach(), centred.mean) < 1e-20


def test_biases_are_saved_and_loaded(tmp_path):
    model, ids = tiny.llama(), torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    rankwise.compress(model, Lord(), keep=0.8, data=ids)
    assert all(layer.biased for layer in structured(model).values())
    again, _ = rankwise.load(rankwise.save(model, tmp_path / "model"))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert {n: layer.biased for n, layer in structured(again).items()} == dict.fromkeys(structured(model), True)
    rankwise.save(again, tmp_path / "again")
    folded = rankwise.fold(again)
    torch.testing.assert_close(folded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="before it is folded"):
        rankwise.save(folded, tmp_path / "folded")


@pytest.mark.parametrize(
    "leave",
    [rankwise.absorb, lambda model: rankwise.remove_adapter(model, "a"), lambda model: None],
    ids=["absorb", "remove", "keep"],
)
def test_biases_outlive_adapters(leave, tmp_path):
    model, ids = tiny.llama(), torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    rankwise.compress(model, Lord(), keep=0.8, data=ids)
    rankwise.adapt(model, Lora(rank=2), name="a")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    folded = copy.deepcopy(model)
    leave(model)
    assert all(layer.biased for layer in structured(model).values())
    if not adapted(model):
        again, _ = rankwise.load(rankwise.save(model, tmp_path / "model"))
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    rankwise.adapt(rankwise.fold(folded), Lora(rank=2), name="b")
    rankwise.use(folded, None)
    rankwise.remove_adapter(folded, "b")
    with pytest.raises(ValueError, match="before it is folded"):
        rankwise.save(folded, tmp_path / "folded")
