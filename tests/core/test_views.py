"""Which layers are seen as matrices."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import rankwise
from rankwise.adapters import Lora
from rankwise.compressors import PlainSvd
from rankwise.core.surgery import StructuredLinear
from rankwise.core.views import view_of


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Other(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight).relu()


class Scaled(nn.Linear):
    """Like a linear layer as long as its scale is one."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight, self.bias) * self.scale


def test_a_class_of_its_own_that_computes_the_same_is_a_linear_layer():
    assert view_of(Own(4, 3)) is not None
    assert view_of(Own(4, 3, bias=False)) is not None
    for layer in (Other(4, 3), Scaled(4, 3), parametrizations.weight_norm(nn.Linear(4, 3))):
        assert view_of(layer) is None
    torch.manual_seed(0)
    net, x = nn.Sequential(Own(16, 16), Other(16, 16)), torch.randn(3, 16)
    assert [row["name"] for row in rankwise.compress(net, PlainSvd(), keep=0.9).rows] == ["0"]
    before = net(x)
    torch.testing.assert_close(rankwise.fold(net)(x), before)


def test_what_attention_reads_and_never_calls_is_none():
    assert view_of(nn.MultiheadAttention(8, 2).out_proj) is None


def test_padding_in_words_is_padding_in_numbers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 8)
    for options in ({"padding": "same"}, {"padding": "valid"}, {"padding": "same", "dilation": (1, 2)}):
        layer = nn.Conv2d(3, 4, (3, 5), **options)
        net = nn.Sequential(layer)
        before = net(x)
        rankwise.adapt(net, Lora(rank=2))
        assert isinstance(net[0], StructuredLinear)
        torch.testing.assert_close(net(x), before)
        torch.testing.assert_close(rankwise.fold(net)(x), before)
    assert view_of(nn.Conv2d(3, 4, (4, 3), padding="same")) is None  # one more zero on one side
