"""With the right matrices feedback alignment is back-propagation; with random ones weights align with them."""

import math

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.adapters import Lora
from rankwise.estimators import DirectFeedbackAlignment, FeedbackAlignment
from rankwise.linalg import gaussian, seeded

CLOSE: dict[str, float] = {"rtol": 1e-12, "atol": 1e-14}
CLASSES = 3


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def two(width: int = 7) -> tuple[nn.Sequential, nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    a, b = nn.Linear(5, width), nn.Linear(width, CLASSES)
    return nn.Sequential(a, nn.Tanh(), b).double(), a, b


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def exact(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def test_gradients_are_those_of_the_formula():
    model, a, b = two()
    x, y = draw(9, 5), labels(9)
    rankwise.estimate(model, FeedbackAlignment(gain=2.0)).backward(x, y)
    with torch.no_grad():
        h = (x @ a.weight.mT + a.bias).tanh()
        error = ((h @ b.weight.mT + b.bias).softmax(-1) - functional.one_hot(y, CLASSES)) / 9
        feedback = 2 / 7**0.5 * gaussian(CLASSES, 7, seeded(0, 1)).double()
        delta = (error @ feedback) * (1 - h.square())
    torch.testing.assert_close(a.weight.grad, delta.mT @ x, **CLOSE)
    torch.testing.assert_close(b.weight.grad, error.mT @ h, **CLOSE)


def test_direct_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    a, b, c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, CLASSES)
    model, x, y = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c).double(), draw(9, 5), labels(9)
    rankwise.estimate(model, DirectFeedbackAlignment()).backward(x, y)
    with torch.no_grad():
        h = (x @ a.weight.mT + a.bias).tanh()
        g = (h @ b.weight.mT + b.bias).tanh()
        error = ((g @ c.weight.mT + c.bias).softmax(-1) - functional.one_hot(y, CLASSES)) / 9
        for i, (layer, before, after) in enumerate(((a, x, h), (b, h, g))):
            units = after.shape[1]
            feedback = gaussian(units, CLASSES, seeded(0, i, 0)).double() / units**0.5
            delta = (error @ feedback.mT) * (1 - after.square())
            torch.testing.assert_close(layer.weight.grad, delta.mT @ before, **CLOSE)


def test_with_the_true_weights_it_is_back_propagation():
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(inplace=True)]
    parts += [nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), nn.ReLU(), nn.Flatten()]
    parts += [nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
    model, x, y = nn.Sequential(*parts).double(), draw(5, 2, 8, 8), labels(5)
    true = exact(model, x, y)
    weights = {(len(p), p[0].numel()): p.detach() for p in model.parameters() if p.dim() > 1}

    def transposed(rows: int, columns: int, generator: Generator) -> Tensor:
        return weights[rows, columns].flatten(1) * columns**0.5

    rankwise.estimate(model, FeedbackAlignment(projection=transposed)).backward(x, y)
    for found, grad in zip(gradients(model), true, strict=True):
        torch.testing.assert_close(found, grad, **CLOSE)
    model.zero_grad()
    rankwise.estimate(model, FeedbackAlignment()).backward(x, y)
    assert not torch.allclose(gradients(model)[0], true[0])


def test_direct_feedback_with_the_true_weights_is_back_propagation_below_the_head():
    model, _, b = two()
    x, y = draw(9, 5), labels(9)
    true = exact(model, x, y)

    def transposed(rows: int, columns: int, generator: Generator) -> Tensor:
        return b.weight.detach().mT * rows**0.5

    rankwise.estimate(model, DirectFeedbackAlignment(projection=transposed)).backward(x, y)
    for found, grad in zip(gradients(model), true, strict=True):
        torch.testing.assert_close(found, grad, **CLOSE)


def test_errors_of_inputs_go_the_same_way():
    model, a, _ = two()
    x, y = draw(9, 5).requires_grad_(), labels(9)
    heard: list[Tensor] = []
    a.register_forward_hook(lambda module, args, output: output.register_hook(heard.append) and None)
    rankwise.estimate(model, FeedbackAlignment()).backward(x, y)
    feedback = gaussian(7, 5, seeded(0, 0)).double() / 5**0.5
    torch.testing.assert_close(x.grad, heard[0] @ feedback, **CLOSE)


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
def test_estimates_align_with_true_gradients(kind: type):
    model, _, _ = two(width=20)
    x, handle = draw(200, 5), rankwise.estimate(model, kind())
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def cosine() -> float:
        true = exact(model, x, y)[0]
        handle.backward(x, y)
        found = gradients(model)[0]
        model.zero_grad()
        return float(functional.cosine_similarity(found.flatten(), true.flatten(), 0))

    before = cosine()
    for _ in range(80):
        optimizer.zero_grad()
        handle.backward(x, y)
        optimizer.step()
    model.zero_grad()
    assert cosine() > before + 0.2


@pytest.mark.parametrize("kind", [FeedbackAlignment, DirectFeedbackAlignment])
@pytest.mark.parametrize("gain", [0.0, math.inf, math.nan])
def test_bad_gains_are_refused(kind: type, gain: float):
    with pytest.raises(ValueError, match="gain"):
        kind(gain=gain)


def test_feedback_alignment_refuses_layers_that_are_adapted():
    model, _, _ = two()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, layer: name == "0")
    with pytest.raises(ValueError, match="fold it first"):
        rankwise.estimate(model, FeedbackAlignment()).backward(draw(9, 5), labels(9))
    assert all(p.grad is None for p in model.parameters())


def test_direct_feedback_reaches_layers_that_are_adapted():
    model, _, _ = two()
    rankwise.adapt(model, Lora(rank=2), where=lambda name, layer: name == "0")
    model[2].requires_grad_(True)
    x, y = draw(9, 5), labels(9)
    handle = rankwise.estimate(model, DirectFeedbackAlignment())
    assert handle.blocks == ("1",)
    handle.backward(x, y)
    found = gradients(model)
    assert not torch.allclose(found[0], exact(model, x, y)[0])


def test_direct_feedback_needs_a_tensor():
    rnn = nn.Sequential(nn.Linear(5, 5), nn.GRU(5, CLASSES, batch_first=True))
    handle = rankwise.estimate(
        rnn, DirectFeedbackAlignment(), loss=lambda out, y: functional.cross_entropy(out[0][:, -1], y)
    )
    with pytest.raises(TypeError, match="returns a tensor"):
        handle.backward(draw(4, 6, 5).float(), labels(4))
