"""The start at the gradient: its first step, its labels, and what it refuses."""

import pytest
import torch
from contracts.examples import draw
from contracts.problems import fill
from tiny import llama, plain
from torch import Generator, Tensor, nn

import rankwise
from rankwise.adapters import Lora
from rankwise.core import labels
from rankwise.core.statistics import WeightGradient
from rankwise.initialisers import GradientSvd, Uniform
from rankwise.matrices import Base, Dense

M, N, RANK = 12, 10, 2


def step(method: Lora, rate: float) -> tuple[Tensor, Tensor]:
    """The gradient of a regression's weight, and how one step of gradient descent on the factors changes it."""
    weight, x, y = draw(M, N).requires_grad_(), draw(40, N, seed=1), draw(40, M, seed=2)

    def loss(outputs: Tensor) -> Tensor:
        return 0.5 * (outputs - y).square().sum(1).mean()

    loss(x @ weight.mT).backward()
    assert weight.grad is not None
    stats = fill(method.needs, x, (x @ weight.mT - y).detach())
    matrix = method.attach(Base(Dense(weight.detach().clone())), stats, Generator().manual_seed(0)).double()
    loss(matrix(x)).backward()
    with torch.no_grad():
        before = matrix.dense()
        for p in matrix.parameters():
            if p.requires_grad:
                assert p.grad is not None
                p -= rate * p.grad
        return weight.grad, (matrix.dense() - before) / rate


def best(gradient: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(gradient)
    return u[:, :rank] * s[:rank] @ vt[:rank]


@pytest.mark.parametrize(
    ("method", "size"),
    [
        (Lora(rank=RANK, start=GradientSvd(gamma=None)), 1.0),
        (Lora(rank=RANK, alpha=6.0, start=GradientSvd(gamma=None)), 1.0),
        (Lora(rank=RANK, start=GradientSvd(gamma=5.0)), M**0.5 / 5),
        (Lora(rank=RANK, alpha=6.0, rank_stabilised=True, start=GradientSvd()), 36 / RANK * M**0.5 / 16),
    ],
)
def test_the_first_step_is_the_best_of_twice_the_rank(method: Lora, size: float):
    """(s c)^2 times the best rank-2r part of the step of full fine-tuning, up to the second order of the rate."""
    gradient, change = step(method, 1e-8)
    torch.testing.assert_close(change, -size * best(gradient, 2 * RANK), rtol=1e-5, atol=1e-5)


def test_a_start_at_zero_gets_less_from_its_first_step():
    gradient, change = step(Lora(rank=RANK, start=Uniform()), 1e-8)
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) == RANK
    cosine = -float((change * gradient).sum() / change.norm() / gradient.norm())
    limit = float(best(gradient, RANK).norm() / gradient.norm())  # what r directions can have of it at most
    gradient, ours = step(Lora(rank=RANK, start=GradientSvd()), 1e-8)
    assert cosine <= limit < -float((ours * gradient).sum() / ours.norm() / gradient.norm())


def test_the_labels_are_those_of_the_data():
    """The gradient is that of the next token's loss, which with drawn labels it is not."""
    model, name = llama(), "model.layers.0.mlp.up_proj"
    batches = plain()
    found = rankwise.calibrate(model, [WeightGradient], data=batches).layers[name][WeightGradient]
    for ids in batches:
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    gradient = model.get_submodule(name).weight.grad
    expected = gradient.double() / sum(ids.numel() for ids in batches)
    torch.testing.assert_close(found.value(), expected, rtol=1e-3, atol=1e-6)
    model.zero_grad()
    drawn = rankwise.calibrate(model, [WeightGradient], data=batches, labels=labels.sampled).layers[name]
    assert not torch.allclose(drawn[WeightGradient].value(), expected, rtol=0.1, atol=1e-6)


def test_the_models_own_samples_have_no_gradient_to_start_at():
    with pytest.raises(ValueError, match="give data of the task"):
        rankwise.adapt(llama(), Lora(rank=2, start=GradientSvd()), data="self")


def test_bad_arguments():
    with pytest.raises(ValueError, match="gamma"):
        GradientSvd(gamma=0)
    base = Base(Dense(draw(M, N)))
    gradient = fill([WeightGradient], draw(9, N), draw(9, M, seed=1))
    with pytest.raises(ValueError, match="at most 5"):
        Lora(rank=6, start=GradientSvd()).attach(base, gradient, Generator())
    zero = fill([WeightGradient], torch.zeros(9, N), draw(9, M))
    with pytest.raises(ValueError, match="is zero"):
        Lora(rank=2, start=GradientSvd()).attach(base, zero, Generator())


@pytest.mark.parametrize("called", [False, True])
def test_labels_of_the_data_do_not_reach_a_model_that_takes_none(called: bool):
    class Tempered(nn.Module):
        """The second argument is not labels."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, inputs: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
            return self.layer(inputs) / temperature

    model, x, y = Tempered(), draw(30, 6).float(), torch.arange(30) % 4
    batch = {"inputs": x, "labels": y} if called else (x, y)
    found = rankwise.calibrate(model, [WeightGradient], data=[batch]).layers["layer"][WeightGradient]
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert model.layer.weight.grad is not None
    torch.testing.assert_close(found.value().float(), model.layer.weight.grad)


def test_factors_are_where_the_base_is():
    base = Base(Dense(torch.empty(M, N, device="meta")))
    stats = fill(GradientSvd().needs, draw(40, N), draw(40, M))
    matrix = Lora(rank=RANK, start=GradientSvd()).attach(base, stats, Generator())
    assert {tensor.device.type for tensor in matrix.state_dict().values()} == {"meta"}
