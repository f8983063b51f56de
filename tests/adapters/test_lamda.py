"""LaMDA: what freezes stays, what trains at the end, and what is kept for the backward pass."""

import math

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor, nn

import rankwise
from rankwise.adapters import Lamda
from rankwise.core.adapted import adapted
from rankwise.matrices import Base, Dense, Frozen, Product, Scheduled, StructuredMatrix

STEPS, RANK = 20, 5


def parts(matrix: nn.Module) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """B, D and A."""
    scheduled = next(m for m in matrix.modules() if isinstance(m, Scheduled))
    product = next(m for m in matrix.modules() if isinstance(m, Product) and m.parts[0] is scheduled)
    core = next(m for m in product.parts[1].modules() if isinstance(m, Dense))
    outer = next(m for m in matrix.modules() if isinstance(m, Product))
    return scheduled.matrix.get_parameter("weight"), core.weight, outer.parts[1].get_parameter("matrix.weight")


def attach(weight: Tensor, **fields) -> StructuredMatrix:
    return Lamda(**fields).attach(Base(Dense(weight)), {}, Generator())


@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_frozen_columns_keep_their_bits(optimizer_of: type[torch.optim.Optimizer]):
    matrix = attach(draw(12, 8), rank=RANK, until=0.5)
    left, core, right = parts(matrix)
    momentum = {} if optimizer_of is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = optimizer_of([left, core], lr=0.05, weight_decay=0.1, **momentum)
    follower = rankwise.follow(matrix, optimizer, steps=STEPS)
    x, y = draw(30, 8, seed=1), draw(30, 12, seed=2)
    last = 10
    for done in range(STEPS):
        count = math.floor(RANK * min(done, last) / last)
        before = left.detach().clone()
        optimizer.zero_grad()
        (matrix(x) - y).square().mean().backward()
        assert right.grad is None
        assert (left.grad is None) == (done >= last)
        optimizer.step()
        same = (left == before).all(0)
        assert same[:count].all()
        assert not same[count:].any()  # the others do move
    assert sum(p.numel() for p in matrix.parameters() if p.requires_grad) == RANK**2
    assert left not in optimizer.state
    follower.finish()
    assert not any(isinstance(m, Scheduled) for m in matrix.modules())
    assert sum(p.numel() for p in matrix.parameters() if p.requires_grad) == RANK**2
    matrix.train()(x)


def test_without_the_schedule_momentum_and_decay_move_them():
    """What zeroed gradients alone would do: the control of the test above."""
    left = nn.Parameter(draw(12, 5))
    optimizer = torch.optim.AdamW([left], lr=0.05)
    left.grad = draw(12, 5, seed=1)
    optimizer.step()
    before = left.detach().clone()
    left.grad = torch.zeros_like(left)
    optimizer.step()
    assert not (left == before).any()


def test_the_start_is_exact_in_float32():
    weight, x = draw(40, 30).float(), draw(7, 30, seed=1).float()
    matrix = attach(weight, rank=10, alpha=3.0).eval()
    assert torch.equal(matrix(x), x @ weight.mT)


def test_the_gradient_of_the_core():
    weight, x, upstream = draw(12, 8), draw(6, 8, seed=1), draw(6, 12, seed=2)
    matrix = attach(weight, rank=3, alpha=6.0).eval()
    left, core, right = parts(matrix)
    matrix(x).backward(upstream)
    gradient = upstream.mT @ x
    torch.testing.assert_close(core.grad, 2.0 * left.mT @ gradient @ right.mT)
    torch.testing.assert_close(right @ right.mT, torch.eye(3, dtype=torch.float64))
    sigma = torch.linalg.svdvals(weight)[:3]
    torch.testing.assert_close(left.grad, 2.0 * gradient @ right.mT @ (sigma / 2).diag())


def test_r_numbers_an_input_are_kept_for_the_backward_pass():
    m, n, r, tokens = 96, 80, 4, 200
    matrix = attach(draw(m, n).float(), rank=r)
    rankwise.follow(matrix, torch.optim.SGD([p for p in matrix.parameters() if p.requires_grad]), steps=1)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = draw(tokens, n, seed=1).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = matrix(x)
    own = {p.untyped_storage().data_ptr() for p in matrix.parameters()}
    kept = [tensor for key, tensor in saved.items() if key not in own]
    assert sum(tensor.numel() for tensor in kept if tensor.shape[0] == tokens) == 2 * r * tokens
    y.sum().backward()


def test_a_turn_inside_the_leading_subspaces_needs_the_core_alone():
    """And no r^2 numbers between random projections can make it."""
    r, weight = 4, draw(16, 12)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    turn = torch.linalg.qr(draw(r, r, seed=3)).Q
    teacher = weight + u[:, :r] @ (turn @ s[:r].diag() - s[:r].diag()) @ vt[:r]
    matrix = attach(weight, rank=r)
    left, core, _ = parts(matrix)
    optimizer = torch.optim.Adam([{"params": [left], "lr": 0.0}, {"params": [core]}], lr=0.05)
    rankwise.follow(matrix, optimizer, steps=400)
    x = draw(100, 12, seed=4)
    for _ in range(400):
        optimizer.zero_grad()
        (matrix(x) - x @ teacher.mT).square().mean().backward()
        optimizer.step()
    reached = float((matrix.dense().detach() - teacher).norm() / (teacher - weight).norm())
    p, q = torch.linalg.qr(draw(16, r, seed=5)).Q, torch.linalg.qr(draw(12, r, seed=6)).Q
    best = p @ (p.mT @ (teacher - weight) @ q) @ q.mT
    random = float((teacher - weight - best).norm() / (teacher - weight).norm())
    assert reached < 0.02 < 0.8 < random


def test_a_whole_model_ends_with_r_squared_a_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
    rankwise.adapt(model, Lamda(rank=3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    rankwise.follow(model, optimizer, steps=10)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(2, 10)).square().sum().backward()
        optimizer.step()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 9
    assert all(any(isinstance(m, Frozen) for m in layer.modules()) for layer in adapted(model).values())


def test_bad_fields():
    with pytest.raises(ValueError, match="until must be"):
        Lamda(until=0.0)
    with pytest.raises(ValueError, match="rank"):
        attach(draw(4, 3), rank=4)
