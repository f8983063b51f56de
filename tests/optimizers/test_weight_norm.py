"""Weight normalisation against torch's parametrisation, and the lengths that are learnt."""

from collections.abc import Callable

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.transforms import Transform, state_bytes
from rankwise.optimizers import adam, galore, sgd, weight_norm
from rankwise.projectors import Svd

X, Y = draw(40, 7), draw(40, 5, seed=1)


def ours(transform: Transform, lr: float, decay: float, steps: int, weight: Tensor) -> Tensor:
    param = nn.Parameter(weight.clone())
    optimizer = Optimizer([([param], transform)], lr=lr, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        (X @ param.mT - Y).square().mean().backward()
        optimizer.step()
    return param.detach()


def theirs(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int, weight: Tensor
) -> tuple[Tensor, Tensor]:
    layer = nn.Linear(7, 5, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer = nn.utils.parametrizations.weight_norm(layer, dim=0)
    optimizer = make(list(layer.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(X) - Y).square().mean().backward()
        optimizer.step()
    return layer.weight.detach(), layer.parametrizations.weight.original1.detach().norm(dim=1)  # type: ignore[union-attr]


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("lr", [0.02, 0.3])  # with long steps, lengths turn negative
def test_it_is_torchs_parametrisation_under_adamw(lr: float, decay: float):
    weight = 0.2 * draw(5, 7, seed=2)
    wanted, _ = theirs(lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay), 30, weight)
    torch.testing.assert_close(ours(weight_norm(), lr, decay, 30, weight), wanted, rtol=1e-9, atol=1e-9)


def test_it_is_torchs_parametrisation_under_gradient_descent_whose_directions_only_grow():
    weight = 0.2 * draw(5, 7, seed=2)
    kind = weight_norm(inner=sgd(beta=0.9), magnitude=sgd(beta=0.9))
    wanted, _ = theirs(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 30, weight)
    torch.testing.assert_close(ours(kind, 0.1, 0.0, 30, weight), wanted, rtol=1e-9, atol=1e-9)
    _, lengths = theirs(lambda p: torch.optim.SGD(p, lr=0.1), 30, weight)
    assert bool((lengths > weight.norm(dim=1)).all())  # each step is across V


def test_lengths_are_learnt():
    """Rows of a teacher are far from the first lengths; the published optimiser stays within one step of them."""
    found = ours(weight_norm(), 0.05, 0.0, 400, 0.01 * draw(5, 7, seed=2))
    best = torch.linalg.lstsq(X, Y).solution.mT
    torch.testing.assert_close(found.norm(dim=1), best.norm(dim=1), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("inner", [adam(), galore(rank=2, every=3)])
def test_rows_of_zeros_stay_finite_and_begin_to_move(inner: Transform):
    weight = 0.2 * draw(5, 7, seed=2)
    weight[1] = 0
    once = ours(weight_norm(inner=inner), 0.05, 0.1, 1, weight)
    later = ours(weight_norm(inner=inner), 0.05, 0.1, 60, weight)
    assert bool(later.isfinite().all())
    assert bool(once[1].any())
    assert float((X @ later.mT - Y)[:, 1].square().mean()) < float(Y[:, 1].square().mean())


def test_no_copy_of_the_weight_is_kept():
    weight = torch.empty(64, 256, device="meta")
    direct, normed = (state_bytes(kind, weight) for kind in (galore(rank=8), weight_norm(inner=galore(rank=8))))
    assert normed - direct == 4 * 64 * (3 + 2) + 8  # three numbers a row, Adam of the lengths, and a counter


def test_only_the_direction_is_projected():
    """With one direction of rank one left, a step has rank one beside the change of lengths."""
    weight = draw(5, 7, seed=2)
    kind = weight_norm(inner=galore(rank=1, projector=Svd(), inner=sgd()), magnitude=sgd())
    made = ours(kind, 1e-5, 0.0, 1, weight)
    unit = weight / weight.norm(dim=1, keepdim=True)
    change = made / made.norm(dim=1, keepdim=True) - unit
    across = change - (change * unit).sum(1, keepdim=True) * unit
    values = torch.linalg.svdvals(across)
    slope = (X @ weight.mT - Y).mT @ X
    whole = torch.linalg.svdvals(slope - (slope * unit).sum(1, keepdim=True) * unit)
    assert float(values[1] / values[0]) < 0.5 * float(whole[1] / whole[0])
