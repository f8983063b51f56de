"""Adapters that begin at, or train along, directions of the weight itself: PiSSA, SVFit, LoLDU."""

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor

from rankwise.adapters import Loldu, Lora, Pissa, Svfit
from rankwise.adapters.loldu import lower_diagonal_upper
from rankwise.core.methods import Adapter
from rankwise.initialisers import SingularVectors
from rankwise.matrices import Base, Branch, Dense, Diagonal, LowRank, StructuredMatrix, Sum


def attached(method: Adapter, weight: Tensor) -> StructuredMatrix:
    return method.attach(Base(Dense(weight)), {}, Generator().manual_seed(0))


def trained(matrix: StructuredMatrix) -> list[Tensor]:
    return [p for p in matrix.parameters() if p.requires_grad]


def spectrum(values: Tensor, m: int, n: int) -> Tensor:
    """A weight with given singular values (k,), k <= min(m, n)."""
    u, v = (torch.linalg.qr(draw(size, len(values), seed=size))[0] for size in (m, n))
    return u * values @ v.mT


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_what_pissa_trains_is_the_leading_part(alpha: float | None):
    weight = draw(12, 8)
    matrix = attached(Pissa(rank=3, alpha=alpha), weight)
    left, right = trained(matrix)
    u, s, vt = torch.linalg.svd(weight)
    scale = 1.0 if alpha is None else alpha / 3
    torch.testing.assert_close(scale * left @ right, u[:, :3] * s[:3] @ vt[:3])
    torch.testing.assert_close(left.mT @ left, right @ right.mT)  # both have sqrt(Sigma / s)
    same = attached(Lora(rank=3, alpha=alpha, start=SingularVectors()), weight)
    assert all(torch.equal(p, q) for p, q in zip(matrix.parameters(), same.parameters(), strict=True))


def test_a_trained_pissa_is_a_lora_of_twice_the_rank():
    weight = draw(12, 8)
    matrix = attached(Pissa(rank=2), weight)
    left, right = trained(matrix)
    left_0, right_0 = left.detach().clone(), right.detach().clone()
    left.data += 0.1 * draw(12, 2, seed=1)
    right.data += 0.1 * draw(2, 8, seed=2)
    lora = LowRank(torch.cat([left, -left_0], 1).detach(), torch.cat([right, right_0]).detach())
    torch.testing.assert_close(matrix.dense(), weight + lora.dense())


@pytest.mark.parametrize(("iterations", "excess"), [(4, 1e-3), (16, 1e-9)])
@pytest.mark.parametrize("decay", [0.3, 0.5, 1.0])
def test_the_fast_start_is_nearly_the_best(decay: float, iterations: int, excess: float):
    """On spectra that fall off slowly, as those of trained weights do, against the optimum in float64."""
    values = torch.arange(1, 97, dtype=torch.float64) ** -decay
    weight, best = spectrum(values, 128, 96), float(values[8:].square().sum().sqrt())

    def error(count: int) -> float:
        left, right = trained(attached(Pissa(rank=8, iterations=count), weight))
        return float((weight - left @ right).detach().norm())

    assert best * (1 - 1e-12) <= error(iterations) < best * (1 + excess)
    assert error(0) > best * 1.01  # it is the iterations that do it


@pytest.mark.parametrize("relative", [False, True])
def test_gradients_of_singular_values(relative: bool):
    weight, x, y = draw(12, 8).requires_grad_(), draw(5, 8, seed=2), draw(5, 12, seed=3)
    (x @ weight.mT - y).square().sum().backward()
    matrix = attached(Svfit(rank=5, relative=relative), weight.detach())
    (matrix(x) - y).square().sum().backward()
    u, s, vt = torch.linalg.svd(weight.detach())
    assert weight.grad is not None
    expected = (u.mT @ weight.grad @ vt.mT).diagonal()[:5] * (s[:5] if relative else 1)
    torch.testing.assert_close(trained(matrix)[0].grad, expected)


@pytest.mark.parametrize("relative", [False, True])
def test_svfit_moves_singular_values_alone(relative: bool):
    weight, change = draw(12, 8), 0.1 * draw(5, seed=1)
    matrix = attached(Svfit(rank=5, relative=relative), weight)
    trained(matrix)[0].data = change
    s = torch.linalg.svdvals(weight)
    s[:5] = s[:5] * (1 + change) if relative else s[:5] + change
    torch.testing.assert_close(torch.linalg.svdvals(matrix.dense()), s.sort(descending=True).values)


@pytest.mark.parametrize(("energy", "count"), [(0.5, 1), (0.63, 1), (0.65, 2), (0.99, 2), (0.999, 3), (1.0, 3)])
def test_energy_is_the_share_of_the_squares(energy: float, count: int):
    weight = spectrum(
        torch.tensor([8.0, 6.0, 0.5], dtype=torch.float64), 6, 5
    )  # 0.638, 0.998 and 1 of the squares
    (numbers,) = trained(attached(Svfit(energy=energy), weight))
    assert len(numbers) == count


def test_loldu_is_the_decomposition_by_its_definition():
    for m, n in ((8, 8), (12, 8), (8, 12)):
        weight = draw(m, n)
        left, pivots, upper = lower_diagonal_upper(weight)
        permutation, lower, right = torch.linalg.lu(weight)
        torch.testing.assert_close(left, permutation @ lower)  # the order of rows is P
        torch.testing.assert_close(pivots, right.diagonal())
        torch.testing.assert_close(left * pivots @ upper, weight)
        torch.testing.assert_close(upper.diagonal(), torch.ones_like(pivots))


def test_gradients_of_pivots():
    weight, x, y = draw(12, 8).requires_grad_(), draw(5, 8, seed=2), draw(5, 12, seed=3)
    (x @ weight.mT - y).square().sum().backward()
    matrix = attached(Loldu(rank=5, alpha=2.0), weight.detach())
    (matrix(x) - y).square().sum().backward()
    permutation, lower, upper = torch.linalg.lu(weight.detach())
    upper = upper / upper.diagonal()[:, None]
    assert weight.grad is not None
    expected = 2 / 5 * ((permutation @ lower).mT @ weight.grad @ upper.mT).diagonal()[:5]
    torch.testing.assert_close(trained(matrix)[0].grad, expected)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(6, 5).double(), draw(6, 1) @ draw(1, 5), torch.cat([torch.zeros(3, 5).double(), draw(3, 5)])],
    ids=["zero", "rank one", "zero rows"],
)
def test_pivots_that_are_zero_do_no_harm(weight: Tensor):
    matrix = attached(Loldu(rank=5), weight)
    assert torch.equal(matrix.dense(), weight)
    trained(matrix)[0].data += 1
    assert bool(matrix.dense().isfinite().all())
    assert float(matrix.dense().detach().abs().max()) < 100
    left, pivots, upper = lower_diagonal_upper(weight)
    torch.testing.assert_close(left * pivots @ upper, weight)


def test_truncated_lu_is_no_low_rank_approximation():
    """The docstring's warning: of a random weight it leaves more than there was; the SVD leaves less."""
    weight = draw(256, 256)
    left, pivots, upper = lower_diagonal_upper(weight)
    s = torch.linalg.svdvals(weight)
    for r in (16, 64, 128):
        assert float((weight - left[:, :r] * pivots[:r] @ upper[:r]).norm()) > float(weight.norm())
        assert float(s[r:].norm()) < float(weight.norm())


CORES = [Svfit(rank=5), Svfit(rank=5, relative=True), Loldu(rank=5, alpha=2.0)]


@pytest.mark.parametrize("method", CORES, ids=str)
def test_a_diagonal_core_is_an_exact_lora(method: Adapter):
    weight, d = draw(12, 8), draw(5, seed=1)
    matrix = attached(method, weight)
    trained(matrix)[0].data = d
    (branch,) = (part for part in matrix.modules() if isinstance(part, Branch))
    left, core, right = branch.matrix.parts  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(core, Diagonal)
    root = branch.scale**0.5 * d.abs().sqrt()
    lora = LowRank((left.dense() * root * d.sign()).detach(), (root[:, None] * right.dense()).detach())
    torch.testing.assert_close(matrix.dense(), Sum(Dense(weight), lora).dense())


def fit(method: Adapter, weight: Tensor, target: Tensor) -> float:
    """How much of the squared distance to a target weight is left when it is the loss, at its minimum."""
    matrix = attached(method, weight)
    (numbers,) = trained(matrix)
    dyads = torch.autograd.functional.jacobian(
        lambda d: torch.func.functional_call(_Dense(matrix), {_name(matrix): d}).flatten(), numbers.detach()
    )
    solved = torch.linalg.lstsq(dyads, (target - weight).flatten()[:, None]).solution
    left = (target - weight).flatten() - (dyads @ solved)[:, 0]
    return float(left.square().sum() / (target - weight).square().sum())


class _Dense(torch.nn.Module):
    def __init__(self, matrix: StructuredMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self) -> Tensor:
        return self.matrix.dense()


def _name(matrix: StructuredMatrix) -> str:
    return next(f"matrix.{name}" for name, p in matrix.named_parameters() if p.requires_grad)


def test_what_each_can_and_cannot_reach():
    """A rescaled spectrum is in SVFit's reach and not in LoLDU's; a turned weight is in neither's."""
    weight = draw(8, 8)
    u, s, vt = torch.linalg.svd(weight)
    rescaled = u * (s * (1 + draw(8, seed=1).abs())) @ vt
    turned = torch.linalg.qr(draw(8, 8, seed=2))[0] @ weight
    assert fit(Svfit(rank=8), weight, rescaled) < 1e-20
    assert fit(Loldu(rank=8), weight, rescaled) > 0.1
    off_diagonal = u.mT @ (turned - weight) @ vt.mT
    least = 1 - float(off_diagonal.diagonal().square().sum() / off_diagonal.square().sum())
    assert fit(Svfit(rank=8), weight, turned) == pytest.approx(least)
    assert least > 0.3
    assert fit(Loldu(rank=8), weight, turned) > 0.3


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Pissa(rank=0), "rank"),
        (lambda: Pissa(iterations=-1), "iterations"),
        (lambda: Svfit(rank=0), "rank"),
        (lambda: Svfit(energy=0), "energy"),
        (lambda: Svfit(dropout=1), "dropout"),
        (lambda: Loldu(alpha=0), "alpha"),
        (lambda: Loldu(dropout=-1), "dropout"),
        (lambda: attached(Svfit(rank=9), draw(12, 8)), "larger than the 8 singular values"),
        (lambda: attached(Loldu(rank=9), draw(12, 8)), "larger than the 8 pivots"),
        (lambda: attached(Pissa(rank=9), draw(12, 8)), "rank"),
    ],
)
def test_bad_arguments(method, message: str):
    with pytest.raises(ValueError, match=message):
        method()
