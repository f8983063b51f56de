"""Directions that are products: the same steps as of what they stand for, without holding that."""

from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise import Optimizer
from rankwise.core.combining import chain
from rankwise.core.directions import Factors, add_to, formed
from rankwise.core.transforms import Transform
from rankwise.core.writing import Nearest
from rankwise.optimizers import adafactor, adam, fira, galore, ldadam, q_galore, quantised, sgd, trion
from rankwise.projectors import Cosine, RandomOrthogonal, Svd

SHAPES = ((24, 60), (60, 24))


def made(count: int, transposed: bool) -> tuple[Factors, Tensor]:
    """A product of the shape (count, 6, 9), and what it stands for."""
    shapes = ((9, 2), (2, 6)) if transposed else ((6, 2), (2, 9))
    left, right = (draw(count, *shape, seed=seed) for seed, shape in enumerate(shapes))
    product = Factors(left, right, transposed)
    return product, (left @ right).mT if transposed else left @ right


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_it_is_added_as_what_it_stands_for(count: int, transposed: bool):
    product, whole = made(count, transposed)
    values = draw(count, 6, 9, seed=5)
    for each, wanted in ((product, whole), (product.mT, whole.mT)):
        before = values.mT.clone() if wanted.shape[-1] == 6 else values.clone()
        torch.testing.assert_close(formed(each), wanted, rtol=1e-12, atol=1e-12)
        after = add_to(before.clone(), each, keep=0.9, factor=-0.3)
        torch.testing.assert_close(after, 0.9 * before - 0.3 * wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matrices_of_any_type_and_order_are_written(dtype: torch.dtype):
    product, whole = made(1, False)
    for start in (draw(6, 9, seed=5).to(dtype), draw(9, 6, seed=5).to(dtype).T):
        param = start.clone(memory_format=torch.preserve_format)
        Nearest()([param], [product], 0.9, -0.3, {})
        wanted = (0.9 * start.double() - 0.3 * whole[0]).to(dtype)
        torch.testing.assert_close(param, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)
        assert param.stride() == start.stride()


class Largest(TorchDispatchMode):
    """Remembers the most numbers of a tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what is new."""
        found = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        if isinstance(found, Tensor) and found.device.type == "cpu":
            new = found.untyped_storage().data_ptr() not in known
            self.most = max(self.most, found.numel() * new)
        return found


def largest(transform: Transform, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
    """The most numbers of a tensor that is made in a step between two choices of the basis."""
    param = nn.Parameter(draw(*shape, seed=1).to(dtype))
    optimizer = Optimizer([([param], transform)], lr=0.1, weight_decay=0.1)
    for step in range(2):
        param.grad = draw(*shape, seed=step).to(dtype)
        optimizer.step()
    param.grad = draw(*shape, seed=2).to(dtype)
    with Largest() as seen:
        optimizer.step()
    return seen.most


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "transform",
    [
        galore(rank=4),
        galore(rank=4, projector=Svd(), inner=adafactor()),
        galore(rank=4, projector=Cosine(), inner=sgd(beta=0.9)),
        galore(rank=4, projector=RandomOrthogonal()),
    ],
    ids=["galore", "adafactor", "cosine", "random"],
)
def test_steps_between_two_choices_hold_nothing_of_the_size_of_the_matrix(
    transform: Transform, shape: tuple[int, int]
):
    assert largest(transform, shape) < 24 * 60 / 2
    assert largest(transform, shape, torch.bfloat16) == 24 * 60  # which float32 is rounded to at once
    assert largest(adam(), shape) == 24 * 60


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "transform",
    [
        galore(rank=4),
        q_galore(rank=4),
        ldadam(rank=4),
        trion(rank=4),
        fira(rank=4),
        quantised(galore(rank=4), least=16),
        chain(galore(rank=4), sgd(beta=0.5)),
    ],
    ids=["galore", "q_galore", "ldadam", "trion", "fira", "quantised", "chain"],
)
def test_unformed_is_the_same_direction(transform: Transform, shape: tuple[int, int]):
    param, index = draw(2, *shape, seed=9), torch.arange(2)
    one, two = transform.init(param, index), transform.init(param, index)
    for step in range(4):
        grad = draw(2, *shape, seed=step)
        whole, lazy = transform.update(grad, one, param), transform.update_unformed(grad, two, param)
        torch.testing.assert_close(formed(lazy), whole, rtol=0, atol=0)
