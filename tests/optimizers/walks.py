"""Walks of optimisers over given gradients, to compare what they make of parameters."""

from collections.abc import Callable
from typing import Any

import torch
from contracts import examples
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.seen import wide
from rankwise.core.subspaces import Subspace
from rankwise.core.transforms import Transform
from rankwise.optimizers.project import Project
from rankwise.projectors import Every, Keep

SHAPES = [(6, 9), (9, 6), (7,), ()]
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return examples.draw(*(shape or (1,)), seed=seed).view(shape)


def walk(make: Make, shapes: Any = SHAPES, steps: int = 12, low_rank: int | None = None) -> list[Tensor]:
    """Parameters after some steps with the same gradients."""
    params = [nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = make(params)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, i, step)
        optimizer.step()
    return [p.detach() for p in params]


def gradient(shape: Any, i: int, step: int) -> Tensor:
    return draw(*shape, seed=100 * step + i)


def ours(transform: Transform, lr: float = 0.05, weight_decay: float = 0.0) -> Make:
    return lambda params: Optimizer([(params, transform)], lr=lr, weight_decay=weight_decay)


def assert_same(one: list[Tensor], two: list[Tensor], **close: float) -> None:
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, **(close or CLOSE))


def inside(projector: Any, inner: Transform, rank: int, **options: Any) -> Transform:
    """A projection of matrices alone, also where the rank is the whole side."""
    rule = {"refresh": Every(3), "carry": Keep(), **options}
    return wide(Project(subspace=Subspace(projector=projector, rank=rank, **rule), inner=inner))


def plain_adam(grads: list[Tensor], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Tensor:
    """The last direction of Adam, from all gradients at once."""
    t = len(grads)
    mean = sum(g * (1 - betas[0]) * betas[0] ** (t - 1 - i) for i, g in enumerate(grads))
    square = sum(g.square() * (1 - betas[1]) * betas[1] ** (t - 1 - i) for i, g in enumerate(grads))
    return torch.as_tensor(mean / (1 - betas[0] ** t) / ((square / (1 - betas[1] ** t)) ** 0.5 + eps))
