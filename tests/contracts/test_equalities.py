"""Methods that are special cases of each other give the same matrices."""

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, exactly, fill
from torch import Tensor

from rankwise.compressors import (
    ActivationAwareSvd,
    FisherSvd,
    KroneckerFactoredSvd,
    PlainSvd,
    WhitenedSvd,
)
from rankwise.core.choices import Choices
from rankwise.core.statistics import GradientWeightedInput, InputGram, InputMagnitude, OutputGradGram, Stats

SHAPES = [(9, 9), (14, 6), (6, 14)]
GAUGES = ["pivot", "factors"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def gram(size: int, seed: int) -> Tensor:
    rows = correlated(200, size, seed)
    return rows.mT @ rows / 200


def metric(inputs: Tensor, outputs: Tensor) -> Stats:
    return {InputGram: exactly(InputGram, inputs), OutputGradGram: exactly(OutputGradGram, outputs)}


def assert_same(one: Choices, two: Choices, scale: float = 1.0) -> None:
    torch.testing.assert_close(one.errors, scale * two.errors, rtol=1e-10, atol=1e-10 * one.total)
    assert one.total == pytest.approx(scale * two.total, rel=1e-10)
    for i in range(len(one.errors)):
        torch.testing.assert_close(one.build(i).dense(), two.build(i).dense(), **CLOSE)


@pytest.fixture(params=SHAPES)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return draw(*request.param, seed=7)


@pytest.mark.parametrize("gauge", GAUGES)
def test_identity_gradients_give_whitened_svd(weight: Tensor, gauge: str):
    m, n = weight.shape
    stats = metric(gram(n, 1), torch.eye(m))
    method = KroneckerFactoredSvd(input_shrinkage=0.0, output_damping=0.0, gauge=gauge)
    assert_same(method.choices(weight, stats), WhitenedSvd(gauge=gauge).choices(weight, stats), 0.5)


@pytest.mark.parametrize("gauge", GAUGES)
def test_identity_statistics_give_plain_svd(weight: Tensor, gauge: str):
    m, n = weight.shape
    stats = metric(torch.eye(n), torch.eye(m))
    plain = PlainSvd(gauge=gauge).choices(weight, {})
    assert_same(WhitenedSvd(damping=0.0, gauge=gauge).choices(weight, stats), plain)
    both = KroneckerFactoredSvd(input_shrinkage=0.0, input_damping=0.0, output_damping=0.0, gauge=gauge)
    assert_same(both.choices(weight, stats), plain, 0.5)
    magnitude = {InputMagnitude: exactly(InputMagnitude, torch.ones(n))}
    assert_same(ActivationAwareSvd(floor=1e-16, gauge=gauge).choices(weight, magnitude), plain)
    fisher = {GradientWeightedInput: exactly(GradientWeightedInput, torch.ones(n))}
    assert_same(FisherSvd(damping=0.0, gauge=gauge).choices(weight, fisher), plain)


def test_alpha_zero_gives_plain_svd(weight: Tensor):
    magnitude = {InputMagnitude: exactly(InputMagnitude, draw(weight.shape[1]).abs())}
    method = ActivationAwareSvd(alpha=0.0, floor=1e-16)
    assert_same(method.choices(weight, magnitude), PlainSvd().choices(weight, {}))


def test_diagonal_moments_give_the_diagonal_methods(weight: Tensor):
    size = draw(weight.shape[1], seed=2).abs() + 0.1
    whitened = WhitenedSvd(damping=0.0).choices(weight, {InputGram: exactly(InputGram, size.square().diag())})
    fisher = {GradientWeightedInput: exactly(GradientWeightedInput, size.square())}
    assert_same(FisherSvd(damping=0.0).choices(weight, fisher), whitened)
    magnitude = {InputMagnitude: exactly(InputMagnitude, size)}
    assert_same(ActivationAwareSvd(alpha=1.0, floor=1e-16).choices(weight, magnitude), whitened)


def test_three_forms_of_whitening_agree(weight: Tensor):
    """A Cholesky root, a symmetric root, and the projection on the outputs' directions, which inverts nothing."""
    moment = gram(weight.shape[1], 1)
    energies, vectors = torch.linalg.eigh(moment)
    outputs = torch.linalg.eigh(weight @ moment @ weight.mT)[1].flip(1)
    choices = WhitenedSvd(damping=0.0).choices(weight, {InputGram: exactly(InputGram, moment)})
    for r in range(1, min(weight.shape) + 1):
        found = choices.build(r - 1).dense().detach()
        for root in (torch.linalg.cholesky(moment), vectors * energies.sqrt() @ vectors.mT):
            u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
            torch.testing.assert_close(found, u[:, :r] * s[:r] @ vt[:r] @ torch.linalg.inv(root), **CLOSE)
            assert float(choices.errors[r - 1]) == pytest.approx(float(s[r:].square().sum()), abs=1e-10)
        torch.testing.assert_close(found, outputs[:, :r] @ outputs[:, :r].mT @ weight, **CLOSE)


@pytest.mark.parametrize("other", [PlainSvd, ActivationAwareSvd, FisherSvd])
def test_no_method_beats_whitening_on_the_outputs(weight: Tensor, other: type):
    m, n = weight.shape
    x = correlated(200, n, 1)
    stats = fill((InputGram, InputMagnitude, GradientWeightedInput), x, correlated(200, m, 3))
    best, rival = WhitenedSvd(damping=0.0).choices(weight, stats), other().choices(weight, stats)
    total = float((x @ weight.mT).square().sum())
    for i in range(len(best.errors)):
        ours, theirs = (
            float((x @ (weight - choices.build(i).dense().detach()).mT).square().sum())
            for choices in (best, rival)
        )
        assert ours <= theirs + 1e-10 * total
        assert 200 * float(best.errors[i]) == pytest.approx(ours, rel=1e-4, abs=1e-6 * total)


def test_a_transposed_problem_has_the_transposed_answer(weight: Tensor):
    m, n = weight.shape
    inputs, outputs = gram(n, 1), gram(m, 2)
    method = KroneckerFactoredSvd(input_shrinkage=0.0, input_damping=0.0, output_damping=0.0, gauge="factors")
    one = method.choices(weight, metric(inputs, outputs))
    two = method.choices(weight.mT, metric(outputs, inputs))
    torch.testing.assert_close(one.errors, two.errors, rtol=1e-8, atol=1e-10 * one.total)
    for i in range(len(one.errors)):
        torch.testing.assert_close(one.build(i).dense(), two.build(i).dense().mT, rtol=0, atol=1e-7)


def test_both_gauges_hold_the_same_matrix(weight: Tensor):
    stats = metric(gram(weight.shape[1], 1), gram(weight.shape[0], 2))
    pivot, factors = (KroneckerFactoredSvd(gauge=gauge).choices(weight, stats) for gauge in GAUGES)
    assert_same(pivot, factors)


def test_gradients_of_one_size_give_whitened_svd_its_fisher_form():
    """If |g| is the same for every token, the Fisher weights are the input moments' diagonal, scaled."""
    weight, x = draw(9, 7), correlated(300, 7, 1)
    grad = torch.nn.functional.normalize(draw(300, 9, seed=4), dim=1)
    fisher = FisherSvd(damping=0.0).choices(weight, fill([GradientWeightedInput], x, grad))
    diagonal = {InputGram: exactly(InputGram, x.square().mean(0).diag())}
    whitened = WhitenedSvd(damping=0.0).choices(weight, diagonal)
    torch.testing.assert_close(fisher.errors, whitened.errors, rtol=1e-5, atol=1e-7 * whitened.total)


def test_the_metric_is_the_loss_change_of_a_quadratic_model():
    """With g = S^(1/2) noise, 1/2 E[(g' D x)^2] is the error that the method predicts."""
    weight, change = draw(5, 4), 0.1 * draw(5, 4, seed=1)
    x, grad = correlated(100_000, 4, 1), correlated(100_000, 5, 3)
    stats = metric(x.mT @ x / len(x), grad.mT @ grad / len(grad))
    choices = KroneckerFactoredSvd(input_shrinkage=0.0, input_damping=0.0, output_damping=0.0).choices(
        weight, stats
    )
    sampled = 0.5 * ((x @ change.mT) * grad).sum(1).square().mean()
    assert choices.error_of(change) == pytest.approx(float(sampled), rel=0.05)


@pytest.mark.parametrize("other", [PlainSvd, WhitenedSvd, ActivationAwareSvd, FisherSvd])
def test_no_method_beats_the_metric_at_its_own_rank(weight: Tensor, other: type):
    m, n = weight.shape
    needs = (InputGram, OutputGradGram, InputMagnitude, GradientWeightedInput)
    stats = fill(needs, correlated(200, n, 1), correlated(200, m, 3))
    best, rival = KroneckerFactoredSvd().choices(weight, stats), other().choices(weight, stats)
    for i, error in enumerate(best.errors.tolist()):
        assert error <= best.error_of(weight - rival.build(i).dense().detach()) + 1e-10 * best.total
