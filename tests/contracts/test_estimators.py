"""What every exported estimator of gradients promises."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise import estimators
from rankwise.estimators import DirectFeedbackAlignment, FeedbackAlignment, TargetProjection
from rankwise.estimators.base import Estimator
from rankwise.estimators.target_projection import sign
from rankwise.linalg import orthogonal

SETTINGS: dict[str, list[Estimator]] = {
    "DirectFeedbackAlignment": [DirectFeedbackAlignment(), DirectFeedbackAlignment(projection=orthogonal)],
    "FeedbackAlignment": [FeedbackAlignment(), FeedbackAlignment(projection=orthogonal, gain=0.5)],
    "TargetProjection": [
        TargetProjection(),
        TargetProjection(error=sign, projection=orthogonal, gain=0.5),
        TargetProjection(cells=2, steps=2, share=0.99),
        TargetProjection(cells=None),
    ],
}
BATCH, CLASSES = 6, 3


class Reader(nn.Module):
    """A recurrent layer whose last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.GRU(5, 7, num_layers=2, batch_first=True), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x)[0][:, -1])


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, CLASSES))


def convolutional() -> nn.Module:
    first = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), nn.Sigmoid())
    return nn.Sequential(*first, second, nn.Flatten(), nn.Linear(24, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (convolutional, (2, 8, 8)),
    "dense": (dense, (5,)),
    "recurrent": (Reader, (4, 5)),
}


def test_all_estimators_are_here():
    assert sorted(SETTINGS) == sorted(estimators.__all__)


@pytest.fixture(params=[(name, i) for name in SETTINGS for i in range(len(SETTINGS[name]))], ids=str)
def estimator(request: pytest.FixtureRequest) -> Estimator:
    name, i = request.param
    return SETTINGS[name][i]


@pytest.fixture(params=sorted(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def build(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    return make().double(), draw(BATCH, *shape, seed=3), torch.arange(BATCH) % CLASSES


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def estimated(estimator: Estimator, kind: str) -> dict[str, Tensor]:
    model, x, y = build(kind)
    rankwise.estimate(model, estimator).backward(x, y)
    return gradients(model)


def exact(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    return gradients(model)


def test_each_trained_parameter_gets_a_gradient_and_no_other(estimator: Estimator, kind: str):
    model, x, y = build(kind)
    frozen, *trained = list(dict(model.named_parameters()))
    model.get_parameter(frozen).requires_grad_(False)
    rankwise.estimate(model, estimator).backward(x, y)
    found = gradients(model)
    assert sorted(found) == sorted(trained)
    for name, grad in found.items():
        p = model.get_parameter(name)
        assert (grad.shape, grad.dtype) == (p.shape, p.dtype)
        assert bool(grad.isfinite().all())
        assert bool(grad.any())


def test_the_last_layer_gets_its_exact_gradient_and_the_loss_is_the_true_one(estimator: Estimator, kind: str):
    model, x, y = build(kind)
    loss = rankwise.estimate(model, estimator).backward(x, y)
    assert not loss.requires_grad
    found = gradients(model)
    model, x, y = build(kind)
    torch.testing.assert_close(loss, functional.cross_entropy(model(x), y).detach())
    true = exact(model, x, y)
    *_, last, bias = true
    torch.testing.assert_close(found[last], true[last], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[bias], true[bias], rtol=1e-12, atol=1e-14)


def test_the_others_do_not(estimator: Estimator, kind: str):
    found, true = estimated(estimator, kind), exact(*build(kind))
    first = next(name for name in true if name.endswith(("0.weight", "weight_ih_l0")))
    if isinstance(estimator, FeedbackAlignment) and kind == "recurrent":
        pytest.skip("of this network only the last layer is linear, so all but one matrix is exact")
    cosine = functional.cosine_similarity(found[first].flatten(), true[first].flatten(), 0)
    assert abs(float(cosine)) < 0.9


def test_the_seed_decides(estimator: Estimator, kind: str):
    first, again = estimated(estimator, kind), estimated(estimator, kind)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = estimated(dataclasses.replace(estimator, seed=1), kind)  # pyright: ignore
    assert not all(torch.allclose(first[name], other[name]) for name in first)


def test_gradients_add_up(estimator: Estimator, kind: str):
    once = estimated(estimator, kind)
    model, x, y = build(kind)
    handle = rankwise.estimate(model.eval() if kind == "convolutional" else model, estimator)
    handle.backward(x, y)
    first = {name: grad.clone() for name, grad in gradients(model).items()}
    with torch.no_grad():  # which callers may have
        handle.backward(x, y)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * first[name])
    if kind != "convolutional":
        assert all(torch.equal(first[name], once[name]) for name in once)


def test_between_passes_the_model_is_as_it_was(estimator: Estimator, kind: str):
    model, x, y = build(kind)
    model.eval()
    before, true = model(x), {name: grad.clone() for name, grad in exact(model, x, y).items()}
    handle = rankwise.estimate(model, estimator)
    handle.backward(x, y)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        handle.backward(x, y[:-1])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all("forward" not in vars(m) for m in model.modules())
    assert torch.equal(model(x), before)
    assert all(torch.equal(grad, true[name]) for name, grad in exact(model, x, y).items())


def test_wrong_arguments_raise_before_anything_is_written(estimator: Estimator, kind: str):
    model, x, y = build(kind)
    handle = rankwise.estimate(model, estimator)
    broken = x.clone()
    broken.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="inputs hold numbers that are not finite"):
        handle.backward(broken, y)
    with pytest.raises(ValueError, match="labels hold numbers that are not finite"):
        handle.backward(x, torch.full((BATCH, CLASSES), torch.inf))
    with pytest.raises(ValueError, match="labels"):
        handle.backward(x, y[:-1])
    assert gradients(model) == {}


def test_a_loss_that_is_not_finite_raises(estimator: Estimator):
    model, x, y = build("dense")
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        rankwise.estimate(model, estimator).backward(x, y)


def test_short_types_work(estimator: Estimator, kind: str):
    model, x, y = build(kind)
    exactly = estimated(estimator, kind)
    model = model.bfloat16()
    rankwise.estimate(model, estimator).backward(x.bfloat16(), y)
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.bfloat16
        assert float((grad.double() - exactly[name]).norm()) < 0.2 * float(exactly[name].norm()) + 0.02


def test_autocast_works(estimator: Estimator, kind: str):
    model, x, y = build(kind)
    model = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rankwise.estimate(model, estimator).backward(x.float(), y)
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in gradients(model).values())


def test_floating_targets_work(estimator: Estimator):
    model, x, _ = build("dense")
    loss = rankwise.estimate(model, estimator, loss=functional.mse_loss).backward(x, draw(BATCH, CLASSES))
    assert float(loss) > 0
    assert len(gradients(model)) == 6


def test_training_lowers_the_loss(estimator: Estimator, kind: str):
    model, x, y = build(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    handle, losses = rankwise.estimate(model, estimator), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(float(handle.backward(x, y)))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


class Recomputed(nn.Module):
    """The dense network, whose activations may be computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.reentrant = dense(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        return self.net[-1](checkpoint(self.net[:-1], x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients_or_are_refused(estimator: Estimator, reentrant: bool):
    found, x, labels = [], draw(BATCH, 5).float(), torch.arange(BATCH) % CLASSES
    for way in (None, reentrant):
        model = Recomputed(way)
        handle = rankwise.estimate(model, estimator)
        given = x.clone().requires_grad_(reentrant)
        if way is not None and (reentrant or isinstance(estimator, TargetProjection)):
            with pytest.raises(ValueError, match="turn gradient checkpointing off"):
                handle.backward(given, labels)
            return
        handle.backward(given, labels)
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
