"""Modules that read the weight of a structured layer compute what they did."""

import copy
import pickle
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.adapters import Lora
from rankwise.compressors import PlainSvd
from rankwise.core.surgery import StructuredLinear
from rankwise.matrices import LowRank


def weight_of(net: nn.Sequential) -> Any:
    return net[0].weight


def test_products_are_those_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    left, right, x, z = (
        torch.randn(*s, generator=generator).double() for s in ((5, 2), (2, 7), (3, 7), (4, 7, 6))
    )
    layer, dense = StructuredLinear(LowRank(left, right)), left @ right
    weight = layer.weight
    for found, wanted in (
        (functional.linear(x, weight), x @ dense.mT),
        (functional.linear(x, weight, torch.ones(5).double()), x @ dense.mT + 1),
        (x @ weight.T, x @ dense.mT),
        (torch.matmul(x, weight.t()), x @ dense.mT),
        (weight @ z, dense @ z),
        (weight @ x[0], dense @ x[0]),
        (z.mT[..., :5] @ weight, z.mT[..., :5] @ dense),
        (weight.mT @ z[0, :5], dense.mT @ z[0, :5]),
    ):
        torch.testing.assert_close(found, wanted)
        assert type(found) is torch.Tensor


def test_it_is_an_empty_tensor_else():
    layer = StructuredLinear(LowRank(torch.ones(5, 2), torch.ones(2, 7)))
    assert (layer.weight.numel(), layer.weight.dtype) == (0, torch.float32)
    assert layer.to(torch.float64).weight.dtype == torch.float64
    for each in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight)), layer.weight.detach()):
        assert type(each) is torch.Tensor
        assert each.shape == (0,)
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert {*each.state_dict()} == {"weight", "matrix.left", "matrix.right"}
        assert type(each.state_dict()["weight"]) is torch.Tensor
    assert layer.weight.fill_(1.0).shape == (0,)
    assert layer.weight.new_zeros(2).shape == (2,)


def test_what_else_computes_with_it_has_the_matrix():
    torch.manual_seed(0)
    layer = StructuredLinear(LowRank(torch.randn(5, 2), torch.randn(2, 7)))
    weight, dense, x = layer.weight, layer.matrix.dense(), torch.randn(3, 7)
    for found, wanted in (
        (weight.norm(), dense.norm()),
        (functional.normalize(weight, dim=1), functional.normalize(dense, dim=1)),
        (x @ (weight * 0.5).T, x @ (dense * 0.5).T),
        (torch.cat([weight.t(), dense.t()]), torch.cat([dense.t(), dense.t()])),
        (2 - weight, 2 - dense),
        (weight[1:, 2], dense[1:, 2]),
        (torch.einsum("ij,kj->ik", x, weight), x @ dense.mT),
        (weight.view(7, 5), dense.view(7, 5)),
    ):
        torch.testing.assert_close(found, wanted)
        assert type(found) is torch.Tensor
    weight.square().sum().backward()
    assert float(layer.matrix.left.grad.norm()) > 0


def test_a_convolution_tells_its_geometry():
    conv = nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2), dilation=1)
    net = nn.Sequential(conv)
    rankwise.compress(net, PlainSvd(), keep=0.8)
    assert isinstance(net[0], StructuredLinear)
    for name in (
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "in_channels",
        "out_channels",
        "groups",
        "padding_mode",
    ):
        assert getattr(net[0], name) == getattr(conv, name), name


def test_fast_paths_of_torch_step_aside():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval(), torch.randn(2, 6, 16)
    with torch.no_grad():
        before = model(x)
        rankwise.adapt(model, Lora(rank=2))
        torch.testing.assert_close(model(x), before)


def test_a_weight_that_multiplies_from_the_left():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.dt_proj = nn.Linear(4, 12)

        def forward(self, x):
            return (self.dt_proj.weight @ x.mT).mT + self.dt_proj.bias

    torch.manual_seed(0)
    model, x = Steps(), torch.randn(2, 5, 4)
    before = model(x)
    rankwise.adapt(model, Lora(rank=2))
    torch.testing.assert_close(model(x), before)
    rankwise.fold(model)
    rankwise.compress(model, PlainSvd(), keep=0.9)
    found = model(x)
    torch.testing.assert_close(found, rankwise.fold(model)(x))


def test_a_weight_that_is_stored_transposed_is_multiplied_as_it_is_stored():
    torch.manual_seed(0)
    net, x = nn.Sequential(Conv1D(12, 8)), torch.randn(3, 8)
    expected = x @ weight_of(net), weight_of(net) @ torch.ones(12)
    rankwise.adapt(net, Lora(rank=2))
    torch.testing.assert_close((x @ weight_of(net), weight_of(net) @ torch.ones(12)), expected)
