"""The compander: its function and inverse, its gradients, its limit, and what it does to weights."""

import math

import pytest
import tiny
import torch
from contracts.examples import draw
from torch import Generator, nn

import rankwise
from rankwise.core.surgery import structured
from rankwise.matrices import Companded
from rankwise.optimizers import sgd
from rankwise.starts import CompandedStart


def test_the_function_is_odd_rising_bounded_and_inverted():
    v = torch.linspace(-50, 50, 1001, dtype=torch.float64)[None]
    w = Companded(v, height=0.8, width=1.7).dense().detach()
    torch.testing.assert_close(w, -w.flip(-1))
    assert bool((w.diff() > 0).all())
    assert float(w.max()) < 0.8 * math.pi / 2
    weight = draw(5, 7)
    bound = 1.1 * float(weight.abs().max()) * 2 / math.pi
    torch.testing.assert_close(Companded.of(weight, height=bound, width=0.3).dense().detach(), weight)
    cut = Companded.of(100 * weight, height=0.5, width=1.0).dense().detach()
    torch.testing.assert_close(cut.abs().max(), torch.tensor(0.99 * 0.5 * math.pi / 2).double())


def test_a_step_of_gradient_descent_is_the_squared_slope():
    a, b, lr, slope = 1.3, 0.9, 1e-7, draw(4, 6, seed=1)
    matrix = Companded(draw(4, 6), height=a, width=b)
    before = matrix.dense().detach()
    (matrix.dense() * slope).sum().backward()
    optimizer = rankwise.Optimizer([(matrix.parameters(), sgd())], lr=lr)
    rate = a / b / (1 + (matrix.values.detach() / b) ** 2)
    optimizer.step()
    torch.testing.assert_close(
        (matrix.dense().detach() - before) / lr, -rate.square() * slope, rtol=1e-5, atol=1e-6
    )


def test_a_wide_knee_is_no_compander():
    """With a = b -> infinity the same steps as of the weight itself; with a narrow one others."""
    x, y, ends = draw(30, 6), draw(30, 4, seed=1), []
    for width in (None, 1e4, 1.0):
        weight = 0.3 * draw(4, 6, seed=2)
        if width is None:
            matrix: nn.Module = rankwise.matrices.Dense(weight)
        else:
            matrix = Companded.of(weight, height=width, width=width)
        optimizer = rankwise.Optimizer([(matrix.parameters(), sgd(beta=0.9))], lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            (matrix(x) - y).square().mean().backward()
            optimizer.step()
        ends.append(matrix.dense().detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-2)


@pytest.mark.parametrize("learned", [False, True])
def test_a_trained_model_stays_the_same_until_it_trains_and_folds_back(learned: bool):
    model = tiny.llama(tie_word_embeddings=False)
    ids = torch.randint(64, (8, 16), generator=Generator().manual_seed(0))
    before = model(ids).logits
    report = rankwise.initialise(model, CompandedStart(learned=learned))
    assert len(report.rows) == len(structured(model)) == 14
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.endswith("log_height") for name in names) == learned
    for layer in structured(model).values():
        matrix = layer.matrix.matrix
        assert float(matrix.dense().detach().abs().max()) < float(matrix.log_height.detach().exp()) * math.pi / 2
    after, weight = model(ids).logits, next(iter(structured(model).values())).matrix.dense().detach()
    rankwise.fold(model)
    torch.testing.assert_close(model(ids).logits, after)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.detach(), weight)


def test_weights_that_stand_out_are_not_cut_off():
    weight = draw(20, 30)
    weight[3, 4] = 60.0
    for each in (weight, torch.zeros(4, 5).double()):
        matrix = CompandedStart().of(each, Generator())
        torch.testing.assert_close(matrix.dense().detach(), each)


def test_large_weights_grow_less():
    """Fit a teacher with a few large entries: the largest over the spread falls."""
    x = draw(200, 12)
    teacher = 0.3 * draw(8, 12, seed=1)
    teacher[0, 0] = teacher[3, 5] = 6.0
    shapes = {}
    for kind in (None, CompandedStart(knee=3.0)):
        model = nn.Linear(12, 8, bias=False).double()
        nn.init.normal_(model.weight, std=0.3, generator=Generator().manual_seed(3))
        net = nn.Sequential(model)
        if kind is not None:
            rankwise.initialise(net, kind)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            (net(x) - x @ teacher.mT).square().mean().backward()
            optimizer.step()
        weight = (net[0] if kind is None else rankwise.fold(net)[0]).weight.detach()
        shapes[kind is None] = float(weight.abs().max() / weight.std())
    assert shapes[False] < 0.8 * shapes[True]


def test_the_start_draws_from_its_generator():
    one, two = (CompandedStart().matrix(6, 50, Generator().manual_seed(1)).dense().detach() for _ in range(2))
    assert torch.equal(one, two)
    assert float(one.abs().max()) <= 50**-0.5 + 1e-6
    assert float(one.square().mean()) == pytest.approx(1 / 150, rel=0.2)


def test_bad_arguments():
    for fields in ({"knee": 0.0}, {"gain": math.inf}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            CompandedStart(**fields)
    with pytest.raises(ValueError, match="width"):
        Companded(draw(2, 2), height=1.0, width=-1.0)
