"""Layers seen as matrices: selected, replaced, and folded back to what they were."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.compressors import PlainSvd
from rankwise.core.surgery import StructuredLinear, fold, replace, select, structured
from rankwise.core.views import view_of
from rankwise.matrices import Dense, PivotedLowRank


def replace_all(model: nn.Module, rank: int | None = None) -> None:
    """Replace every selected weight by itself, or by a matrix of low rank."""
    for site in select(model, lambda name, layer: True).values():
        if rank is None:
            replace(model, site, Dense(site.weight.clone()))
        else:
            replace(
                model,
                site,
                PivotedLowRank.from_factors(site.weight[:, :rank], torch.eye(rank, site.weight.shape[1])),
            )


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": (1, 1)},
    {"kernel_size": (2, 3), "dilation": 2, "bias": False},
]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear, empty batch": (lambda: nn.Linear(5, 3), (0, 5)),
    "Conv1D": (lambda: Conv1D(3, 5), (2, 4, 5)),
    **{
        f"conv2d {options}": (
            lambda options=options: nn.Conv2d(2, 4, **{"kernel_size": 3, **options}),
            (3, 2, 9, 8),
        )
        for options in CONVOLUTIONS
    },
    "conv2d, unbatched": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 9, 8)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[request.param]
    torch.manual_seed(0)
    return build().double(), torch.randn(shape, dtype=torch.float64)


def test_replaced_and_folded_layers_compute_the_same(layer_and_input: tuple[nn.Module, Tensor]):
    layer, x = layer_and_input
    model = nn.Sequential(layer)
    expected = model(x)
    replace_all(model)
    assert isinstance(model[0], StructuredLinear)
    torch.testing.assert_close(model(x), expected)
    fold(model)
    assert type(model[0]) is type(layer)
    assert model[0].extra_repr() == layer.extra_repr()
    assert {k: v.shape for k, v in model[0].state_dict().items()} == {
        k: v.shape for k, v in layer.state_dict().items()
    }
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in model[0].state_dict().items())
    assert torch.equal(model(x), expected)


def test_the_view_is_a_matrix_product(layer_and_input: tuple[nn.Module, Tensor]):
    """outputs(layer(x)) == inputs(x) @ matrix.mT + bias: what the statistics rely on."""
    layer, x = layer_and_input
    view = view_of(layer)
    assert view is not None
    batched = x[None] if isinstance(layer, nn.Conv2d) and x.dim() == 3 else x
    rows = view.inputs(batched) @ view.matrix(layer.get_parameter("weight")).mT
    rows = rows if layer.bias is None else rows + layer.get_parameter("bias")
    torch.testing.assert_close(view.outputs(layer(batched)), rows)


def test_gradients_pass_through_a_structured_layer(layer_and_input: tuple[nn.Module, Tensor]):
    layer, x = layer_and_input
    model = nn.Sequential(copy.deepcopy(layer))
    replace_all(model)
    grads = [torch.autograd.grad(f(y := x.clone().requires_grad_()).square().sum(), y)[0] for f in (layer, model)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 4, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Embedding(4, 4),
        nn.LayerNorm(4),
    ],
)
def test_layers_that_are_no_matrix(layer: nn.Module):
    assert view_of(layer) is None
    with pytest.raises(ValueError, match="no layer was selected"):
        select(nn.Sequential(layer))


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_language_model(tied: bool):
    model = llama(tie_word_embeddings=tied)
    ids = torch.arange(12)[None]
    expected, keys = model(ids).logits, model.state_dict().keys()
    sites = select(model)
    assert len(sites) == 14
    assert not any("lm_head" in name or "embed" in name for name in sites)
    for site in sites.values():
        replace(model, site, Dense(site.weight.clone()))
    assert list(structured(model)) == list(sites)
    torch.testing.assert_close(model(ids).logits, expected)
    assert fold(model) is model
    assert model.state_dict().keys() == keys
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids).logits, expected)


def test_an_output_head_is_selected_only_on_request():
    assert "lm_head" in select(llama(tie_word_embeddings=False), lambda name, layer: "lm_head" in name)
    with pytest.raises(ValueError, match="no layer was selected"):
        select(llama(tie_word_embeddings=True), lambda name, layer: "lm_head" in name)


def test_gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)).eval()
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    assert len(select(model)) == 8
    replace_all(model)
    torch.testing.assert_close(model(ids).logits, expected)
    fold(model)
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert torch.equal(model(ids).logits, expected)


class Shared(nn.Module):
    """One layer at two paths, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_shared_weights_stay_shared():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(2, 4)
    expected = model(x)
    assert [site.names for site in select(model).values()] == [("a", "b"), ("c", "d")]
    replace_all(model)
    assert len(structured(model)) == 4
    assert model.a.matrix is model.b.matrix
    assert model.c.matrix is model.d.matrix
    assert model.a.bias is model.b.bias
    assert model.c.bias is not model.d.bias
    torch.testing.assert_close(model(x), expected)
    fold(model)
    assert model.a.weight is model.b.weight
    assert model.c.weight is model.d.weight
    assert model.a.bias is model.b.bias
    assert sum(1 for _ in model.parameters()) == 5
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_replacing_keeps_mode_and_trained_bias(frozen: bool):
    model = nn.Sequential(nn.Linear(4, 4)).eval().requires_grad_(not frozen)
    replace_all(model)
    assert not model[0].training
    assert model[0].bias.requires_grad != frozen
    fold(model)
    assert not model[0].training
    assert model[0].bias.requires_grad != frozen


def test_a_layer_alone():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    single = StructuredLinear(Dense(layer.weight.detach().clone()), layer.bias)
    assert (single.in_features, single.out_features) == (4, 3)
    assert type(fold(single)) is nn.Linear
    with pytest.raises(ValueError, match="bias"):
        StructuredLinear(Dense(torch.eye(3)), torch.zeros(2))


def test_a_plain_layer_refuses_the_checkpoint_of_a_structured_one():
    model = nn.Sequential(nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    replace_all(model, rank=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(model.state_dict(), strict=False)


def test_a_filter_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no layer was selected"):
        select(nn.Sequential(nn.Linear(2, 2)), lambda name, layer: "attention" in name)


def test_folded_weights_lie_in_order():
    """As files of tensors ask for."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    rankwise.compress(model, PlainSvd(), keep=0.5)
    fold(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
