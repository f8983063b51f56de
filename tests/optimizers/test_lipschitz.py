"""Constraints on norms: polynomials against singular values, limits that hold, and what must fail."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.combining import chain
from rankwise.core.transforms import Transform, state_bytes
from rankwise.linalg import MUON, POLAR_EXPRESS, leading_pair, odd_polynomials, odd_range, spectral_bound
from rankwise.optimizers import (
    adam,
    galore,
    hard_cap,
    lipschitz,
    row_cap,
    sgd,
    soft_cap,
    spectral_decay,
    spectral_hammer,
    spectral_normalize,
)
from rankwise.optimizers.hard_cap import CLIP
from rankwise.optimizers.soft_cap import cap_strength

SHAPES = [(6, 9), (9, 6), (5, 5), (1, 4)]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def norm(weight: Tensor) -> float:
    """From root mean square to root mean square, by an SVD in float64."""
    m, n = weight.shape
    return float(torch.linalg.svdvals(weight.detach().double())[0]) * (n / m) ** 0.5


def constrained(transform: Transform, weight: Tensor, lr: float = 0.0, steps: int = 1) -> Tensor:
    """The weight after steps with gradients of zero."""
    param = nn.Parameter(weight.clone())
    optimizer = Optimizer([([param], transform)], lr=lr)
    for _ in range(steps):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    return param.detach()


def with_values(weight: Tensor, function) -> Tensor:
    """The weight with other singular values, as a function of those in units of norms."""
    m, n = weight.shape
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    unit = (m / n) ** 0.5
    return (u * function(s / unit) * unit) @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_are_above_and_power_steps_below(shape: tuple[int, int]):
    weights = torch.stack([draw(*shape), torch.zeros(shape).double(), 1e-9 * draw(*shape, seed=1)])
    true, p = torch.linalg.matrix_norm(weights, 2), 2**5
    bound = spectral_bound(weights)
    assert bool((bound >= true * (1 - 1e-12)).all())
    assert bool((bound <= true * min(shape) ** (1 / (4 * p)) * (1 + 1e-12) + 1e-60).all())
    eye = torch.eye(*shape, dtype=torch.float64)
    torch.testing.assert_close(spectral_bound(eye), torch.tensor(min(shape) ** (1 / (4 * p))).double())
    start = torch.ones(3, shape[1], dtype=torch.float64)
    _, few, _ = leading_pair(weights, start, 1)
    left, many, right = leading_pair(weights, start, 300)
    assert bool((few <= many * (1 + 1e-9)).all())
    torch.testing.assert_close(many, true)
    torch.testing.assert_close((left[:, None] @ weights @ right[..., None]).flatten(), true)


@pytest.mark.parametrize(
    ("polynomials", "largest"),
    [
        *[(each, largest) for each in ((MUON,) * 5, POLAR_EXPRESS) for largest in (0.5, 1.0)],
        *[(each, 3.0) for each in (CLIP, ((1.0, -0.1, 0.0), (1.0, 0.1, 0.0)), ((1.0, 0.0, -0.2),))],
    ],
)
def test_the_range_of_polynomials_is_that_of_a_fine_grid(polynomials, largest: float):
    grid = torch.linspace(0, largest, 400001, dtype=torch.float64)
    for a, b, c in polynomials:
        grid = a * grid + b * grid**3 + c * grid**5
    low, high = odd_range(polynomials, largest)
    assert low <= float(grid.min()) + 1e-12
    assert high >= float(grid.max()) - 1e-12
    assert (low, high) == pytest.approx((float(grid.min()), float(grid.max())), rel=1e-5, abs=1e-8)


def test_the_soft_cap_couples_as_its_equation_says():
    """-k^9 a^4 + 3 k^7 a^3 - 3 k^5 a^2 + k - limit = 0, the least root; without a need zero."""
    limit = 0.7
    for k in torch.linspace(limit, 81 / 62 * limit, 20, dtype=torch.float64):
        a = float(cap_strength(limit / k) / k**2)
        k = float(k)
        assert abs(-(k**9) * a**4 + 3 * k**7 * a**3 - 3 * k**5 * a**2 + k - limit) < 1e-12
        assert 0 <= 3 * a * k * k <= 1 + 1e-12  # p rises on all of [0, k]
    assert float(cap_strength(torch.ones(()).double())) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_and_hard_caps_change_singular_values_alone(shape: tuple[int, int]):
    weight, limit = draw(*shape), 1.1
    weight = weight * (1.2 * limit / norm(weight))
    m, n = shape
    k = spectral_bound(weight) / (m / n) ** 0.5
    a = cap_strength(limit / k) / k**2
    wanted = with_values(weight, lambda s: (s - a * s**3) + a * (s - a * s**3) ** 3)
    torch.testing.assert_close(constrained(soft_cap(limit=limit), weight), wanted, **CLOSE)

    def clipped(s: Tensor) -> Tensor:
        s = s / limit
        for x, y, z in CLIP:
            s = x * s + y * s**3 + z * s**5
        return s * limit / odd_range(CLIP, 3.0)[1]

    made = constrained(hard_cap(limit=limit), weight)
    torch.testing.assert_close(made, with_values(weight, clipped), **CLOSE)
    far = with_values(made, lambda s: s) - with_values(weight, lambda s: s.clamp_max(limit))
    assert float(torch.linalg.matrix_norm(far, 2)) < 0.05 * limit * (m / n) ** 0.5


def test_what_is_below_the_limit_stays():
    weight = draw(6, 9)
    for make in (soft_cap, hard_cap, spectral_normalize):
        torch.testing.assert_close(constrained(make(limit=1.1 * norm(weight)), weight), weight)
    torch.testing.assert_close(constrained(row_cap(limit=10.0), weight), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_stay_zeros(dtype: torch.dtype):
    kinds = [
        soft_cap(limit=1.0),
        soft_cap(limit=1.0, step=1.0),
        hard_cap(limit=1.0),
        spectral_normalize(limit=1.0),
    ]
    for kind in [*kinds, row_cap(), spectral_hammer(limit=1.0), spectral_decay(rate=1.0)]:
        assert not bool(constrained(kind, torch.zeros(4, 6, dtype=dtype), lr=0.1, steps=3).any()), kind


def test_normalising_the_hammer_and_decay_are_their_formulas():
    weight = draw(6, 9)
    u, s, vt = torch.linalg.svd(weight)
    unit = (6 / 9) ** 0.5
    bound = float(spectral_bound(weight)) / unit
    torch.testing.assert_close(constrained(spectral_normalize(limit=1.0), weight), weight / bound, **CLOSE)
    for limit in (1.0, 4.0):  # below and above
        wanted = weight + (limit * unit - s[0]) * u[:, :1] @ vt[:1]
        made = constrained(spectral_hammer(limit=limit, steps=400), weight)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
    wanted = weight - 0.1 * 0.5 * s[0] * u[:, :1] @ vt[:1]
    made = constrained(spectral_decay(rate=0.5, steps=400), weight, lr=0.1)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)
    rows = constrained(row_cap(limit=0.5), weight).square().mean(1).sqrt()
    torch.testing.assert_close(rows, weight.square().mean(1).sqrt().clamp_max(0.5))


def walk(
    transform: Transform,
    shape: tuple[int, int],
    lr: float,
    steps: int,
    decay: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Norms after each step along gradients that push one way, and turn."""
    weight = nn.Parameter(draw(*shape).to(dtype) * 3)
    optimizer = Optimizer([([weight], transform)], lr=lr, weight_decay=decay)
    push, norms = draw(*shape, seed=5), []
    for step in range(steps):
        weight.grad = (push + draw(*shape, seed=10 + step)).to(dtype)
        optimizer.step()
        norms.append(norm(weight))
    return norms


LIMITS = {
    "paper": (lambda limit: lipschitz(limit=limit), 0.1),
    "paper, long steps": (lambda limit: lipschitz(limit=limit), 1.5),
    "muon's polynomials": (lambda limit: lipschitz(limit=limit, polynomials=(MUON,) * 5), 0.1),
    "measured": (lambda limit: lipschitz(constraint=soft_cap(limit=limit)), 0.1),
    "hard": (lambda limit: lipschitz(constraint=hard_cap(limit=limit)), 0.1),
    "normalised": (lambda limit: lipschitz(constraint=spectral_normalize(limit=limit)), 0.1),
    "adam": (lambda limit: chain(adam(), soft_cap(limit=limit)), 0.1),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_limits_hold_after_each_step(name: str, shape: tuple[int, int]):
    make, lr = LIMITS[name]
    norms = walk(make(1.5), shape, lr, 60)
    assert max(norms) <= 1.5 * (1 + 2e-6)
    assert max(norms) > 0.9 * 1.5  # the limit is reached


@pytest.mark.parametrize("kind", [lipschitz(limit=1.5), lipschitz(constraint=soft_cap(limit=1.5))])
def test_half_precision_keeps_the_limit_but_for_rounding(kind: Transform):
    norms = walk(kind, (8, 12), 0.1, 60, dtype=torch.bfloat16)
    assert 0.9 * 1.5 < max(norms) <= 1.5 * 1.005


def test_a_step_that_is_said_to_be_shorter_than_it_is_breaks_the_limit():
    """The control: the coupling is what keeps the limit."""
    assert max(walk(lipschitz(constraint=soft_cap(limit=1.5, step=0.3)), (8, 12), 0.1, 60)) > 1.52


def test_a_hammer_gives_no_guarantee():
    """Steps of full rank push the second value above the limit."""
    assert max(walk(lipschitz(constraint=spectral_hammer(limit=1.5)), (8, 12), 0.1, 60)) > 1.52


def test_the_paper_shrinks_where_no_cap_is_needed_and_we_do_not():
    """Weight decay alone keeps 0.9 below 1: the paper's code would take a = 1, and 0.95 to below 0.45."""
    weight = draw(6, 9)
    weight = weight / norm(weight) * 0.9
    param = nn.Parameter(weight.clone())
    optimizer = Optimizer([([param], soft_cap(limit=1.0, step=0.5))], lr=0.1, weight_decay=1.0)
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    torch.testing.assert_close(param.detach(), weight * 0.9**2)
    (value,) = odd_polynomials(torch.tensor([[0.95]]), [(1.0, -1.0, 0.0), (1.0, 1.0, 0.0)]).flatten().tolist()
    assert value < 0.45


def test_weight_decay_alone_bounds_norms():
    """With s <- (1 - lr d) s + lr c norms end below c / d, and gradients that push one way come near."""
    kind, c = lipschitz(constraint=sgd()), odd_range(POLAR_EXPRESS, 1.0)[1]
    norms = walk(kind, (8, 12), 0.1, 300, decay=0.5)
    assert norms[-1] <= c / 0.5 * (1 + 1e-3)
    assert norms[-1] > 0.7 * c / 0.5
    assert norms[0] > 4  # it began above


def test_the_decay_of_the_largest_value_bounds_norms():
    norms = walk(lipschitz(constraint=spectral_decay(rate=2.0)), (8, 12), 0.05, 300)
    free = walk(lipschitz(constraint=sgd()), (8, 12), 0.05, 300)
    assert max(norms[-50:]) < 0.5 * max(free[-50:])


def test_steps_have_norm_one():
    for shape in SHAPES:
        before = draw(*shape)
        param = nn.Parameter(before.clone())
        param.grad = draw(*shape, seed=3)
        Optimizer([([param], lipschitz(constraint=sgd()))], lr=1.0).step()
        assert norm(before - param.detach()) == pytest.approx(1, abs=2e-3)


def test_a_constraint_inside_a_projection_is_refused():
    transform = galore(rank=2, inner=chain(adam(), soft_cap(limit=0.1)))
    with pytest.raises(ValueError, match="chain it behind"):
        state_bytes(transform, torch.zeros(8, 8))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_bounds_hold_at_any_size_of_the_numbers(size: float):
    weight = draw(6, 9)
    found = spectral_bound((size * weight).float()).double() / size
    torch.testing.assert_close(found, spectral_bound(weight), rtol=1e-5, atol=0)
