"""A frozen weight under autocast: the same numbers, and no copy of it kept."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise.matrices import Base, Dense


def kept(matrix: torch.nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output, and how many numbers the backward pass keeps beside the weight."""
    own, found = {p.untyped_storage().data_ptr() for p in matrix.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = matrix(x)
    return y, sum(t.numel() for key, t in found.items() if key not in own)


def test_a_frozen_weight_keeps_nothing_under_autocast():
    weight = draw(6, 5).float()
    outputs, gradients, numbers = [], [], []
    for matrix in (Base(Dense(weight)), Dense(weight.clone())):
        x = draw(3, 4, 5, seed=1).float().requires_grad_()
        y, count = kept(matrix, x)
        y.float().square().sum().backward()
        outputs.append(y)
        gradients.append(x.grad)
        numbers.append(count)
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)
    assert numbers[0] == 0 < numbers[1]


@pytest.mark.parametrize("trains", [False, True])
def test_with_a_bias_it_is_the_layer_of_torch_under_autocast(trains: bool):
    layer, found = nn.Linear(5, 6), []
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(trains)
    base = Base(Dense(layer.weight))
    for apply in (layer, lambda x: base.affine(x, layer.bias)):
        x = draw(3, 4, 5, seed=1).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = apply(x)
        asked = [x, layer.bias] if trains else [x]
        found.append([y, *torch.autograd.grad(y.float().square().sum(), asked)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_it_compiles_under_autocast():
    torch.compiler.reset()  # the limit of recompilations counts all tests of a process
    matrix, x = Base(Dense(draw(6, 5).float())), draw(3, 5).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(matrix, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, matrix(x))
    y.sum().backward()
    torch.testing.assert_close(
        x.grad, matrix.dense().bfloat16().float().sum(0).expand(3, 5), rtol=0.02, atol=0.02
    )
