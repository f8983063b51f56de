"""GradNormLoRP's steps: one-sided and two-sided projections of the factors of an adapter."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.transforms import Transform, state_bytes
from rankwise.matrices import Base, Branch, Dense, LowRank, RowNormalised
from rankwise.optimizers import adam, grad_norm_lorp, sgd
from rankwise.projectors import Every, Svd


def adapted(rank: int = 4) -> tuple[nn.Module, list[nn.Parameter]]:
    """The adapter's form with rows of trained lengths."""
    branch = Branch(LowRank(torch.zeros(6, rank).double(), draw(rank, 9, seed=3)), 0.5)
    matrix = RowNormalised.of(Base(Dense(draw(6, 9))), branch)
    return matrix, [p for p in matrix.parameters() if p.requires_grad]


def train(matrix: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        (matrix(draw(30, 9, seed=4)) - draw(30, 6, seed=5)).square().mean().backward()
        optimizer.step()
    return matrix.dense().detach()  # type: ignore[operator]


def run(transform: Transform, **options: float) -> Tensor:
    matrix, params = adapted()
    return train(matrix, Optimizer([(params, transform)], **{"lr": 0.02, **options}))


def test_a_projection_to_the_rank_of_the_factors_is_none():
    plain = run(adam(eps=1e-6))
    torch.testing.assert_close(run(grad_norm_lorp(rank=4)), plain, rtol=0, atol=0)
    assert not torch.allclose(run(grad_norm_lorp(rank=2)), plain, atol=1e-3)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_step_is_the_formula(shape: tuple[int, int], two_sided: bool):
    """Steps are scale U inner(U' G) or scale U inner(U' G V) V', with new bases every 3 steps."""
    weight, low, mean = draw(*shape), [], torch.zeros(()).double()
    left, right = torch.empty(0), torch.empty(0)
    param = nn.Parameter(weight.clone())
    kind = grad_norm_lorp(
        rank=2,
        every=Every(3, together=True),
        scale=3.0,
        two_sided=two_sided,
        projector=Svd(),
        inner=sgd(beta=0.5),
    )
    optimizer = Optimizer([([param], kind)], lr=0.1)

    def signed(vectors: Tensor) -> Tensor:
        return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()

    for step in range(7):
        grad = draw(*shape, seed=20 + step)
        param.grad = grad.clone()
        optimizer.step()
        wide = grad if shape[0] <= shape[1] else grad.mT
        if step % 3 == 0:
            left = signed(torch.linalg.svd(wide, full_matrices=False).U[:, :2])
            right = signed(torch.linalg.svd((left.mT @ wide).mT, full_matrices=False).U[:, :2])
        low = left.mT @ wide @ right if two_sided else left.mT @ wide
        mean = 0.5 * mean + low
        back = 3.0 * left @ (mean @ right.mT if two_sided else mean)
        weight = weight - 0.1 * (back if shape[0] <= shape[1] else back.mT)
    torch.testing.assert_close(param.detach(), weight)


def test_both_sides_of_the_svd_of_the_gradient_are_found():
    """The second basis, of the projected gradient, is that of the gradient: U' G = S V'."""
    u, s, vt = torch.linalg.svd(draw(5, 9), full_matrices=False)
    projected = u[:, :2].mT @ (u * s) @ vt
    torch.testing.assert_close(projected, s[:2, None] * vt[:2])


def test_states_are_as_small_as_said():
    r, rho, m, n = 16, 4, 64, 96
    left, right, lengths = torch.empty(m, r), torch.empty(r, n), torch.empty(m)
    counters = 4 * 8  # step of Adam, step, turn and index of the basis
    one = state_bytes(grad_norm_lorp(rank=rho), left, right)
    assert one == 4 * (2 * rho * (m + n) + 2 * rho * r) + 2 * counters
    both = state_bytes(grad_norm_lorp(rank=rho, two_sided=True), left, right)
    assert both == 4 * (2 * 2 * rho**2 + 2 * rho * r + rho * (m + n)) + 2 * (2 * counters - 8)
    assert state_bytes(grad_norm_lorp(rank=rho), lengths) == state_bytes(adam(), lengths)


def test_an_adapted_model_trains():
    matrix, params = adapted()
    optimizer = Optimizer([(params, grad_norm_lorp(rank=2, every=5, scale=1.0))], lr=0.02)
    x, y = draw(30, 9, seed=4), draw(30, 6, seed=5)
    first = float((matrix(x) - y).square().mean().detach())
    frozen = [p.detach().clone() for p in matrix.parameters() if not p.requires_grad]
    train(matrix, optimizer, 60)
    assert float((matrix(x) - y).square().mean().detach()) < 0.8 * first
    for p, before in zip((p for p in matrix.parameters() if not p.requires_grad), frozen, strict=True):
        assert torch.equal(p, before)


def test_two_sides_take_no_share():
    with pytest.raises(ValueError, match="whole number"):
        grad_norm_lorp(rank=0.5, two_sided=True)
