"""The backward pass that writes the matrix out again: its gradients, and what it keeps in between."""

import itertools

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise.core.surgery import StructuredLinear
from rankwise.matrices import (
    IndexedSparse,
    LowRank,
    PivotedLowRank,
    Quantized,
    Recomputed,
    Scaled,
    Sparse,
    StructuredMatrix,
    Sum,
)

M, N, R = 20, 30, 2


def sltrain(dtype: torch.dtype = torch.float64) -> StructuredMatrix:
    sparse = draw(M, N, seed=1) * (draw(M, N, seed=2) > 1.5)
    low_rank = LowRank(draw(M, R, seed=3), draw(R, N, seed=4))
    return Sum(Scaled(low_rank, 0.7), IndexedSparse.from_dense(sparse)).to(dtype)


OTHERS = {
    "sparse with a bitmap": lambda: Sparse.from_dense(draw(M, N) * (draw(M, N, seed=2) > 0)),
    "pivoted": lambda: PivotedLowRank.from_factors(draw(M, R), draw(R, N)),
    "low-bit": lambda: Quantized.from_codes(
        torch.arange(M * N).view(M, N) % 8, draw(M, 3), draw(M, 3, seed=1), bits=3, group=10
    ),
    "sparse plus low rank": sltrain,
}


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_gradients_in_all_combinations(lead: tuple[int, ...], wanted: tuple[bool, ...]):
    plain = sltrain()
    again = Recomputed(plain)
    x, *parameters = tensors = [draw(*lead, N, seed=5), *plain.parameters()]
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(want)
    asked = [tensor for tensor in [x, *parameters] if tensor.requires_grad]
    weights = draw(*lead, M, seed=6)
    torch.testing.assert_close(again(x), plain(x))
    if asked:
        found, expected = (torch.autograd.grad((f(x) * weights).sum(), asked) for f in (again, plain))
        torch.testing.assert_close(found, expected)
    else:
        assert not again(x).requires_grad


@pytest.mark.parametrize("kind", OTHERS)
def test_gradcheck(kind: str):
    matrix = Recomputed(OTHERS[kind]())
    names = [name for name, _ in matrix.named_parameters()]

    def product(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(matrix, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in matrix.parameters()]
    assert torch.autograd.gradcheck(product, (draw(2, N, seed=5).requires_grad_(), *values))


def kept_between_passes(matrix: StructuredMatrix) -> list[int]:
    sizes = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        StructuredLinear(matrix)(draw(4, 3, N, seed=5).requires_grad_())
    return sizes


def test_nothing_of_the_size_of_the_matrix_is_kept():
    matrix = sltrain()
    assert max(kept_between_passes(matrix)) >= M * N
    stored = max(p.numel() for p in matrix.parameters())
    assert max(kept_between_passes(Recomputed(matrix))) <= max(4 * 3 * N, stored) < M * N


def test_bias_and_autocast():
    matrix, bias = sltrain(torch.float32), nn.Parameter(draw(M).float())
    x = draw(2, 5, N, seed=5).float().requires_grad_()
    layers = [StructuredLinear(each, bias) for each in (Recomputed(matrix), matrix)]
    asked = [x, bias, *matrix.parameters()]
    found = []
    for layer in layers:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), asked)))
    for mine, plain in zip(*found, strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=0.05, atol=0.05 * float(plain.detach().abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        assert Recomputed(matrix)(x).dtype == torch.bfloat16


def test_a_changed_parameter_is_noticed():
    matrix = Recomputed(sltrain())
    loss = matrix(draw(3, N)).sum()
    with torch.no_grad():
        next(matrix.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_gradients_are_refused():
    x = draw(3, N).requires_grad_()
    (slope,) = torch.autograd.grad(Recomputed(sltrain())(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_what_is_no_matrix_is_refused():
    with pytest.raises(TypeError, match="StructuredMatrix"):
        Recomputed(torch.eye(2))  # pyright: ignore[reportArgumentType]
