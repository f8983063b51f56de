"""AdamP and SGDP: no step along weights whose length does not matter."""

import math
from typing import Any

import pytest
import torch
from optimizers.walks import assert_same, draw, gradient, ours, walk
from torch import Tensor, nn

from rankwise.optimizers import adam, adamp, sgd, sgdp
from rankwise.optimizers.adamp import Tangent

SHAPES = [(6, 9), (9, 6), (7,), ()]


def projected(step: Tensor, grad: Tensor, weight: Tensor, delta: float) -> tuple[Tensor, bool]:
    """The published test and projection, view by view."""
    for shape in ((len(weight), -1), (1, -1)):
        g, w, u = grad.reshape(shape), weight.reshape(shape), step.reshape(shape)
        cosines = [abs(float(a @ b)) / float(a.norm() * b.norm()) for a, b in zip(g, w, strict=True)]
        if max(cosines) < delta / w.shape[1] ** 0.5:
            rows = [c - b * (b @ c) / float(b.norm()) ** 2 for b, c in zip(w, u, strict=True)]
            return torch.stack(rows).reshape(step.shape), True
    return step, False


@pytest.mark.parametrize("delta", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("kind", [adamp, sgdp])
def test_it_is_its_formula(kind: Any, delta: float):
    """Deltas at which it holds never, at some steps, and always."""
    weight, fired = draw(4, 5, seed=0), []
    m = v = torch.zeros(4, 5).double()
    for t in range(1, 16):
        grad = gradient((4, 5), 0, t - 1)
        if kind is adamp:
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        else:
            m = 0.9 * m + grad
            step = m
        step, found = projected(step, grad, weight, delta)
        fired.append(found)
        weight = weight * (1 - 0.02 * 0.5 * (0.1 if found else 1.0)) - 0.02 * step
    (end,) = walk(ours(kind(delta=delta, weight_decay=0.5), lr=0.02), [(4, 5)], 15)
    torch.testing.assert_close(end, weight, rtol=1e-7, atol=1e-7)
    assert (any(fired), all(fired)) == (delta > 0, delta == math.inf)


@pytest.mark.parametrize(("kind", "inner"), [(adamp, adam()), (sgdp, sgd(beta=0.9))])
def test_where_lengths_matter_it_is_what_it_is_made_of(kind: Any, inner: Any):
    """Gradients along the weights."""
    ends = []
    for transform in (kind(), inner):
        params = [nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
        optimizer = ours(transform)(params)
        for _ in range(8):
            for p in params:
                p.grad = p.detach().clone()
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert_same(*ends, rtol=0, atol=0)
    assert_same(walk(ours(kind(delta=0.0))), walk(ours(inner)), rtol=0, atol=0)
    assert_same(walk(ours(kind(delta=math.inf)), [(7,), ()]), walk(ours(inner), [(7,), ()]), rtol=0, atol=0)
    decayed = walk(ours(kind(delta=0.0, weight_decay=0.3)), SHAPES)
    assert_same(decayed, walk(ours(inner, weight_decay=0.3), SHAPES), rtol=1e-12, atol=1e-12)


def normalised_loss(weight: Tensor) -> Tensor:
    """A loss that does not see the lengths of rows."""
    unit = weight / weight.norm(dim=1, keepdim=True)
    return (unit - torch.nn.functional.normalize(draw(6, 9, seed=9), dim=1)).square().sum()


def test_weights_whose_length_does_not_matter_grow_slowly():
    """|w + d|^2 = |w|^2 + |d|^2 of each row, exactly; with momentum alone they grow much more."""
    lengths = {}
    for name, kind in (("sgdp", sgdp()), ("sgd", sgd(beta=0.9))):
        weight = nn.Parameter(draw(6, 9))
        optimizer, start = ours(kind, lr=0.1)([weight]), weight.detach().norm(dim=1)
        for _ in range(60):
            before = weight.detach().clone()
            optimizer.zero_grad()
            normalised_loss(weight).backward()
            optimizer.step()
            step = weight.detach() - before
            if name == "sgdp":
                squares = before.square().sum(1) + step.square().sum(1)
                torch.testing.assert_close(weight.detach().square().sum(1), squares, rtol=1e-7, atol=1e-9)
        lengths[name] = float((weight.detach().norm(dim=1) - start).mean())
    assert 0 < lengths["sgdp"] < 0.5 * lengths["sgd"]


def test_the_test_of_the_whole_errs_at_8_percent_and_that_of_rows_hardly_ever():
    """2 Phi(0.1) - 1 of random pairs."""
    grad, weight = draw(4000, 8, 32), draw(4000, 8, 32, seed=1)
    for whole, share in ((True, math.erf(0.1 / 2**0.5)), (False, 0.0)):
        step = Tangent(inner=sgd(), whole=whole).update(grad, {}, weight)
        found = float((step != grad).flatten(1).any(1).double().mean())
        assert abs(found - share) < 4 * (share / 4000) ** 0.5 + 1e-3


def test_half_precision_and_bad_fields():
    weight = nn.Parameter(draw(6, 9).bfloat16())
    optimizer = ours(adamp(delta=math.inf, weight_decay=0.1))([weight])
    weight.grad = draw(6, 9, seed=2).bfloat16()
    optimizer.step()
    assert weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="delta"):
        adamp(delta=-0.1)
