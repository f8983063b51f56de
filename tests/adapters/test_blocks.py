"""MiSS and Bat against their formulas, block by block."""

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor

from rankwise.adapters import Bat, Miss
from rankwise.core.methods import Adapter
from rankwise.matrices import Base, Dense, StructuredMatrix


def trained(method: Adapter, weight: Tensor, numbers: Tensor | None = None) -> tuple[StructuredMatrix, Tensor]:
    """The adapter of a weight and its one trained tensor, with new numbers in it."""
    matrix = method.attach(Base(Dense(weight)), {}, Generator())
    (parameter,) = (p for p in matrix.parameters() if p.requires_grad)
    if numbers is not None:
        parameter.data = numbers
    return matrix, parameter


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_miss_is_lora_with_a_tiled_identity(rank: int):
    weight, d, x = draw(12, 8), draw(12, rank, seed=1), draw(5, 8, seed=2)
    matrix, _ = trained(Miss(rank=rank), weight, d)
    tiled = torch.eye(rank, dtype=torch.float64).repeat(1, 8)[:, :8]
    torch.testing.assert_close(matrix.dense(), weight + d @ tiled)
    torch.testing.assert_close(matrix(x), x @ weight.mT + x @ tiled.mT @ d.mT)
    assert int(torch.linalg.matrix_rank(matrix.dense() - weight)) == rank


def test_mini_repeats_its_rows():
    weight, d = draw(12, 8), draw(4, 3, seed=1)
    matrix, parameter = trained(Miss(rank=3, mini=4), weight, d)
    assert parameter.shape == (4, 3)
    expected = torch.tensor([[d[i % 4, j % 3] for j in range(8)] for i in range(12)])
    torch.testing.assert_close(matrix.dense() - weight, expected)


@pytest.mark.parametrize("rank", [3, 4])
def test_the_first_gradient_of_miss_is_that_of_the_weight_summed_over_shards(rank: int):
    weight, x, y = draw(12, 8).requires_grad_(), draw(5, 8, seed=2), draw(5, 12, seed=3)
    (x @ weight.mT - y).square().sum().backward()
    matrix, parameter = trained(Miss(rank=rank), weight.detach())
    (matrix(x) - y).square().sum().backward()
    assert weight.grad is not None
    expected = torch.stack([weight.grad[:, i::rank].sum(1) for i in range(rank)], dim=1)
    torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_bat_is_its_formula_and_can_be_undone(block: int):
    weight, x = draw(12, 8), draw(5, 8, seed=2)
    t = 0.3 * draw(12 // block, block, block, seed=1)
    matrix, _ = trained(Bat(block=block), weight, t)
    new = matrix.dense().detach()
    expected, undone = torch.empty_like(weight), torch.empty_like(weight)
    eye = torch.eye(block, dtype=torch.float64)
    for i in range(12 // block):
        for j in range(8 // block):
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            expected[rows, columns] = weight[rows, columns] + weight[rows, columns] @ t[i] + t[i]
            undone[rows, columns] = (new[rows, columns] - t[i]) @ torch.linalg.inv(eye + t[i])
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(matrix(x), x @ expected.mT)
    torch.testing.assert_close(undone, weight)


def test_bat_of_one_block_is_an_affine_map_and_has_full_rank():
    weight, t = draw(6, 6), draw(1, 6, 6, seed=1)
    torch.testing.assert_close(trained(Bat(block=6), weight, t)[0].dense(), weight + weight @ t[0] + t[0])
    wide = trained(Bat(block=2), weight, draw(3, 2, 2, seed=1))[0].dense() - weight
    assert int(torch.linalg.matrix_rank(wide)) == 6 > 2


def test_an_update_whose_shards_cancel_is_learnt_by_bat_and_never_by_miss():
    """The negative control: inputs without correlation, and a target change that adds up to zero over shards."""
    weight, change = draw(8, 8), draw(8, 8, seed=1)
    change[:, 4:] = -change[:, :4]
    x = torch.linalg.qr(draw(40, 8, seed=2))[0]

    def losses(method: Adapter) -> tuple[float, float]:
        matrix, parameter = trained(method, weight)
        optimizer = torch.optim.Adam([parameter], lr=0.02)
        found = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = (matrix(x) - x @ (weight + change).mT).square().sum()
            loss.backward()
            found.append(float(loss.detach()))
            assert parameter.grad is not None
            if isinstance(method, Miss):
                assert float(parameter.grad.abs().max()) < 1e-12
                continue
            optimizer.step()
        return found[0], found[-1]

    first, last = losses(Miss(rank=4))
    assert last == first
    first, last = losses(Bat(block=4))
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Miss(rank=0), "rank"),
        (lambda: Miss(mini=True), "mini"),
        (lambda: Miss(dropout=1), "dropout"),
        (lambda: Bat(block=0), "block"),
        (lambda: trained(Miss(rank=9), draw(12, 8)), "larger than the 8 inputs"),
        (lambda: trained(Miss(rank=2, mini=5), draw(12, 8)), "mini 5"),
        (lambda: trained(Bat(block=8), draw(12, 8)), "such as 4"),
    ],
)
def test_bad_arguments(method, message: str):
    with pytest.raises(ValueError, match=message):
        method()


def test_bat_keeps_nothing_of_the_size_of_the_weight_for_its_gradient():
    matrix, parameter = trained(Bat(block=4), draw(32, 24))
    x, kept = draw(5, 24, seed=2).requires_grad_(), []
    owned = {p.data_ptr() for p in matrix.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in owned:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = matrix(x)
    assert max(kept) <= x.numel()
    y.sum().backward()
    assert parameter.grad is not None
    assert bool(parameter.grad.any())
