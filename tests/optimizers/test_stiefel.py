"""Steps along orthogonal matrices: the tangent space, retractions, and what is left of plain descent."""

import math
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.cli.options import build
from rankwise.core.combining import chain
from rankwise.core.transforms import Transform
from rankwise.linalg import cayley, stiefel_tangent
from rankwise.optimizers import adam, galore, hard_cap, oblique, orthogonal_penalty, sgd, stiefel
from rankwise.optimizers.manifolds import Manifold, TangentMomentum
from rankwise.optimizers.muon import Orthogonalize
from rankwise.optimizers.oblique import Oblique
from rankwise.optimizers.orthogonal_penalty import NotOrthogonal
from rankwise.optimizers.retractions import Cayley, Polar, Qr, Retraction
from rankwise.optimizers.stiefel import Stiefel

SHAPES = [(4, 4), (3, 7), (1, 5)]
RETRACTIONS = [Polar(), Qr(), Cayley()]
MANIFOLDS = [*(Stiefel(retraction=each) for each in RETRACTIONS), Oblique()]


def members(manifold: Manifold, m: int, n: int, count: int = 3) -> Tensor:
    """Matrices of the set, (count, m, n), m <= n."""
    drawn = draw(count * m, n, seed=5).view(count, m, n)
    if isinstance(manifold, Oblique):
        return drawn / drawn.norm(dim=-2, keepdim=True)
    return torch.linalg.qr(drawn.mT).Q.mT


def constraint(manifold: Manifold, x: Tensor) -> Tensor:
    """What is zero on the set alone."""
    return x.square().sum(-2) - 1 if isinstance(manifold, Oblique) else x @ x.mT - torch.eye(x.shape[-2]).double()


def tangents(manifold: Manifold, point: Tensor) -> Tensor:
    """An orthonormal basis of the null space of the constraint's derivative, (mn, d): the oracle."""
    jacobian = torch.autograd.functional.jacobian(lambda x: constraint(manifold, x), point)
    _, s, vt = torch.linalg.svd(jacobian.reshape(-1, point.numel()))
    return vt[int((s > 1e-9).sum()) :].mT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("manifold", [Stiefel(), Oblique()], ids=str)
def test_the_tangent_part_is_the_projection_on_the_null_space(manifold: Manifold, shape: tuple[int, int]):
    point = members(manifold, *shape, count=1)[0]
    grad, basis = draw(*shape, seed=9), tangents(manifold, point)
    wanted = (basis @ (basis.mT @ grad.flatten())).view(shape)
    torch.testing.assert_close(manifold.tangent(grad, point), wanted, rtol=1e-12, atol=1e-13)
    assert float((grad - wanted).norm()) > 0.1  # something was left out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=str)
def test_retractions_are_retractions(manifold: Manifold, shape: tuple[int, int]):
    point = members(manifold, *shape)
    step = manifold.tangent(draw(3 * shape[0], shape[1], seed=2).view(point.shape), point)
    torch.testing.assert_close(manifold.retract(point, point), point, rtol=1e-12, atol=1e-12)
    far = manifold.retract(point + 0.7 * step, point)
    assert float(constraint(manifold, far).abs().max()) < 1e-12
    h = 1e-5
    slope = (manifold.retract(point + h * step, point) - manifold.retract(point - h * step, point)) / (2 * h)
    torch.testing.assert_close(slope, step, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("shape", "second"), [((3, 7), [Polar()]), ((4, 4), [Polar(), Cayley()])])
def test_second_order_retractions_do_not_accelerate_along_the_manifold(
    shape: tuple[int, int], second: list[Retraction]
):
    """Their second derivative is normal; that of the others is not."""
    point = members(Stiefel(), *shape)
    step, h = stiefel_tangent(draw(3 * shape[0], shape[1], seed=2).view(point.shape), point), 1e-4
    for each in RETRACTIONS:
        ahead, behind = (each(point + sign * h * step, point) for sign in (1, -1))
        along = float(stiefel_tangent((ahead - 2 * point + behind) / h**2, point).norm())
        assert (along < 1e-5 * float(step.norm())) == (each in second)
        assert each in second or along > 0.1 * float(step.norm())


def test_polar_and_qr_are_those_of_lapack():
    moved = members(Stiefel(), 5, 8) + 0.3 * draw(15, 8, seed=4).view(3, 5, 8)
    u, _, vt = torch.linalg.svd(moved, full_matrices=False)
    torch.testing.assert_close(Polar()(moved, None), u @ vt, rtol=1e-12, atol=1e-12)
    low = moved @ Qr()(moved, None).mT  # Z = L Q
    torch.testing.assert_close(low.tril(), low, rtol=0, atol=1e-12)
    assert bool((low.diagonal(dim1=-2, dim2=-1) > 0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_cayley_is_its_formula(shape: tuple[int, int]):
    """Q (I + A/2) (I - A/2)^-1 with A of n x n, made of the step in one piece."""
    point = members(Stiefel(), *shape, count=1)[0]
    step = stiefel_tangent(draw(*shape, seed=3), point)
    half = step - step @ point.mT @ point / 2
    skew = point.mT @ half - half.mT @ point
    torch.testing.assert_close(skew, -skew.mT)
    torch.testing.assert_close(point @ skew, step, rtol=1e-12, atol=1e-12)
    eye = torch.eye(shape[1]).double()
    wanted = point @ (eye + skew / 2) @ torch.linalg.inv(eye - skew / 2)
    torch.testing.assert_close(cayley(step, point), wanted, rtol=1e-11, atol=1e-12)


def walk(transform: Transform, start: Tensor, steps: int, lr: float, seed: int = 0, decay: float = 0.0) -> Tensor:
    """A weight after steps along gradients that change."""
    param = nn.Parameter(start.clone())
    optimizer = Optimizer([([param], transform)], lr=lr, weight_decay=decay)
    for step in range(steps):
        param.grad = draw(*start.shape, seed=seed + step).to(start.dtype)
        optimizer.step()
    return param.detach()


def gap(weight: Tensor, scale: float = 1.0) -> float:
    """|W' W / s^2 - I| of the shorter side, the largest entry, in float64."""
    x = weight.double().flatten(1) / scale
    x = x if x.shape[0] <= x.shape[1] else x.mT
    return float((x @ x.mT - torch.eye(len(x)).double()).abs().max())


INNER: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adam": {"inner": adam()},
    "galore": {"inner": galore(rank=4, every=5)},
    "muon": {"inner": chain(sgd(beta=0.9), Orthogonalize())},
}


@pytest.mark.slow
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("retraction", RETRACTIONS, ids=str)
def test_rounding_does_not_add_up(retraction: Retraction, inner: str):
    """A thousand steps in float32 (fewer for the others), with weight decay."""
    kind = stiefel(retraction=retraction, **INNER[inner])
    for shape, steps in (((16, 16), 1000 if inner == "momentum" else 100), ((24, 8), 50)):
        start = nn.init.orthogonal_(torch.empty(shape), generator=torch.Generator().manual_seed(0))
        moved = walk(kind, start, steps, 0.05, decay=0.1)
        assert gap(moved) < 1e-5
        assert float((moved - start).norm()) > 0.3


def test_without_the_constraint_it_would_be_lost():
    start = nn.init.orthogonal_(torch.empty(16, 16), generator=torch.Generator().manual_seed(0))
    assert gap(walk(sgd(beta=0.9), start, 50, 0.05)) > 1


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
@pytest.mark.parametrize("retraction", RETRACTIONS, ids=str)
def test_to_first_order_it_is_descent_along_the_projected_gradient(
    retraction: Retraction, shape: tuple[int, int]
):
    """Where the gradient is tangent already, that is plain descent; the difference falls as lr^2."""
    scale = 1.7
    start = scale * nn.init.orthogonal_(torch.empty(shape).double(), generator=torch.Generator().manual_seed(1))
    q = (start if shape[0] <= shape[1] else start.mT) / scale
    grad = stiefel_tangent(draw(*q.shape, seed=7), q)
    grad = grad if shape[0] <= shape[1] else grad.mT
    errors = []
    for lr in (1e-2, 1e-3):
        param = nn.Parameter(start.clone())
        param.grad = grad.clone()
        Optimizer([([param], stiefel(beta=0.0, retraction=retraction))], lr=lr).step()
        errors.append(float((param.detach() - (start - lr * grad)).norm()))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)
    assert errors[0] < 1e-2 * 1e-2 * float(grad.norm()) ** 2


def test_with_its_scale_it_is_descent_along_all_multiples_of_orthogonal_matrices():
    """The tangent space of {s Q} is that of Q and Q itself; its projection of a gradient is the step."""
    start = 0.6 * nn.init.orthogonal_(torch.empty(4, 7).double(), generator=torch.Generator().manual_seed(1))
    grad, q = draw(4, 7, seed=3), start / 0.6
    wanted = stiefel_tangent(grad, q) + (grad * q).sum() / 4 * q
    errors = []
    for lr in (1e-2, 1e-3):
        param = nn.Parameter(start.clone())
        param.grad = grad.clone()
        Optimizer([([param], stiefel(beta=0.0, magnitude=sgd()))], lr=lr).step()
        errors.append(float((param.detach() - (start - lr * wanted)).norm()))
        values = torch.linalg.svdvals(param.detach())
        assert float(values[0] - values[-1]) < 1e-12
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


def test_the_scale_decays_and_comes_back_from_below_zero():
    """Weight decay acts on a trained scale alone, and s may pass zero."""
    start = 0.5 * torch.eye(4).double()
    param = nn.Parameter(start.clone())
    optimizer = Optimizer([([param], stiefel(magnitude=sgd()))], lr=0.1, weight_decay=0.5)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), 0.95 * start)
    for _ in range(40):
        optimizer.zero_grad()
        (param + 0.7 * torch.eye(4)).square().sum().backward()
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
    torch.testing.assert_close(param.detach(), -0.7 * torch.eye(4).double(), rtol=1e-3, atol=1e-3)
    fixed = walk(stiefel(), start, 5, 0.0, decay=0.5)
    torch.testing.assert_close(fixed, start)


def test_momentum_is_carried_along():
    """M <- P_W(beta M + g) at each point, written out."""
    weight = members(Stiefel(), 4, 6, count=1)[0]
    found, momentum = walk(stiefel(beta=0.8), weight, 6, 0.05), torch.zeros(4, 6).double()
    for step in range(6):
        momentum = stiefel_tangent(0.8 * momentum + draw(4, 6, seed=step), weight)
        u, _, vt = torch.linalg.svd(weight - 0.05 * momentum, full_matrices=False)
        weight = u @ vt
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_it_finds_the_nearest_rotation():
    """Min |Q X - Y| over orthogonal Q is solved by an SVD (orthogonal Procrustes)."""
    x, y = draw(5, 30), draw(5, 30, seed=1)
    u, _, vt = torch.linalg.svd(y @ x.mT)
    for kind in (stiefel(), stiefel(retraction=Qr()), stiefel(inner=adam())):
        turn = torch.matrix_exp(0.4 * (draw(5, 5, seed=2) - draw(5, 5, seed=2).mT))
        param = nn.Parameter(u @ vt @ turn)
        optimizer = Optimizer([([param], kind)], lr=0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
        for _ in range(400):
            optimizer.zero_grad()
            ((param @ x - y).square().sum() / 30).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(param.detach(), u @ vt, rtol=1e-3, atol=1e-3)


def test_other_matrices_become_orthogonal_at_the_first_step():
    start = draw(6, 9).float()
    moved = walk(stiefel(), start, 1, 0.01)
    values = torch.linalg.svdvals(moved)
    size = float(torch.linalg.matrix_norm(start)) / math.sqrt(6)
    torch.testing.assert_close(values, torch.full((6,), size), rtol=1e-5, atol=0)


def test_a_flattened_kernel_is_orthogonal_and_its_convolution_is_not():
    kernel = nn.init.orthogonal_(torch.empty(4, 2, 3, 3).double(), generator=torch.Generator().manual_seed(0))
    moved = walk(stiefel(), kernel, 3, 0.05)
    assert gap(moved) < 1e-12
    images = torch.eye(2 * 25).double().view(50, 2, 5, 5)
    outputs = nn.functional.conv2d(images, moved, padding=1).flatten(1)  # the convolution as a matrix
    values = torch.linalg.svdvals(outputs)
    assert float(values[0] - values[-1]) > 0.3


def test_columns_keep_their_lengths():
    start = draw(6, 4)
    moved = walk(oblique(scale=0.3), start, 20, 0.1)
    torch.testing.assert_close(moved.norm(dim=0), torch.full((4,), 0.3).double())


def test_the_penalty_has_its_gradient_and_draws_singular_values_to_the_scale():
    weights = draw(6, 5, seed=1).view(2, 3, 5).requires_grad_()
    kind = NotOrthogonal(weight=1.0, scale=1.3)
    gram = torch.stack([each @ each.mT - 1.69 * torch.eye(3).double() for each in weights])
    (slope,) = torch.autograd.grad(gram.square().sum(), weights)
    torch.testing.assert_close(kind.slope(weights.detach()), slope)
    param = nn.Parameter(draw(7, 4))
    optimizer = Optimizer([([param], orthogonal_penalty(weight=1.0, scale=1.3))], lr=0.002)
    for _ in range(600):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    torch.testing.assert_close(torch.linalg.svdvals(param.detach()), torch.full((4,), 1.3).double())


def test_the_command_line_names_retractions():
    words = ["retraction=qr", "inner=adam", "magnitude=sgd"]
    assert build(stiefel, words) == stiefel(retraction=Qr(), inner=adam(), magnitude=sgd())


@pytest.mark.parametrize("make", [stiefel, oblique])
def test_bad_arguments_are_refused(make: Any):
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be a finite number > 0"):
            make(scale=scale)
    with pytest.raises(ValueError, match="leave its constraint out"):
        make(inner=hard_cap(limit=1.0))
    with pytest.raises(ValueError, match="would do nothing"):
        make(beta=0.5, inner=adam())
    with pytest.raises(ValueError, match="beta must be"):
        TangentMomentum(manifold=Oblique(), beta=1.0)
    with pytest.raises(ValueError, match="scale must be"):
        orthogonal_penalty(scale=0.0)
    with pytest.raises(ValueError, match=r"a matrix is zero .* give scale"):
        walk(make(), torch.zeros(3, 4), 1, 0.1)
