"""Adapters on layers that are matrices only when looked at in the right way: convolutions and Conv1D."""

import pytest
import torch
from adapters.methods import METHODS, kind, train
from contracts.examples import draw
from tiny import gpt2, ids
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise import adapters
from rankwise.core.methods import Adapter
from rankwise.core.surgery import StructuredLinear


def images() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, (1, 2)),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    return net.double().eval()


@pytest.mark.parametrize("method", METHODS, ids=kind)
def test_convolutions_start_exactly_train_and_fold(method: Adapter):
    net, x, y = images(), draw(5, 2, 8, 7, seed=1), torch.tensor([0, 1, 2, 3, 0])
    before = net(x).detach()
    rankwise.adapt(
        net,
        method,
        data=[draw(9, 2, 8, 7, seed=2)],
        where=lambda name, layer: isinstance(layer, nn.Conv2d),
        labels=lambda output, batch, generator: output.square().sum(),
    )
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    losses = train(net.train(), lambda: functional.cross_entropy(net(x), y), lr=0.01, steps=5)
    assert losses[-1] < losses[0]
    after = net.eval()(x).detach()
    kinds = [type(layer) for layer in rankwise.fold(net)]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Flatten, nn.Linear]
    torch.testing.assert_close(net(x), after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=kind)
def test_conv1d_starts_exactly_trains_and_folds(method: Adapter):
    model, x = gpt2(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).eval().double(), ids()
    before = model(x).logits.detach()
    report = rankwise.adapt(model, method, data=list(x.split(6)))
    assert len(report.rows) == 8
    torch.testing.assert_close(model(x).logits, before, rtol=1e-6, atol=1e-6)
    losses = train(model.train(), lambda: model(x, labels=x).loss, lr=0.003, steps=4)
    assert losses[-1] < losses[0]
    after = model.eval()(x).logits.detach()
    rankwise.fold(model)
    assert not any(isinstance(layer, StructuredLinear) for layer in model.modules())
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(model(x).logits, after, rtol=1e-6, atol=1e-6)


def test_lora_of_a_convolution_is_two_convolutions():
    """A is a convolution with r outputs and the geometry of the layer, and B one of single points."""
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1)).double(), draw(2, 3, 9, 9)
    before = net(x).detach()
    rankwise.adapt(net, adapters.Lora(rank=2, alpha=3.0))
    left, right = (p for p in net.parameters() if p.requires_grad)
    left.data = draw(8, 2, seed=1)
    narrow = functional.conv2d(x, right.double().view(2, 3, 3, 3), stride=2, padding=1)
    expected = before + 1.5 * functional.conv2d(narrow, left.view(8, 2, 1, 1))
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("method", [adapters.Lora(rank=2), adapters.Bat(block=2)], ids=kind)
def test_a_convolution_in_half_precision_rounds_its_bias_once(method: Adapter):
    net, x = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).bfloat16(), draw(3, 4, 20, 20).bfloat16()
    before = net(x)
    rankwise.adapt(net, method)
    assert float((net(x) != before).double().mean()) < 0.01
