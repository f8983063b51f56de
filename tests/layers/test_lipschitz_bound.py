"""The certificate: exact where it can be, never below what is measured, and silent about nothing."""

import math
from collections.abc import Callable

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn
from torch.nn import functional

import rankwise
from rankwise import Optimizer, lipschitz_bound
from rankwise.certificate import SILU_SLOPE
from rankwise.core.surgery import StructuredLinear
from rankwise.layers import Blend, BoundedAttention, UnitGelu
from rankwise.layers.unit_gelu import GELU_SLOPE
from rankwise.matrices import LowRank
from rankwise.optimizers import lipschitz


def norm(x: Tensor) -> Tensor:
    """The largest root mean square of a row: (k, t, n) -> (k,)."""
    return x.square().mean(-1).sqrt().amax(-1)


def within(x: Tensor, radius: float) -> Tensor:
    """Shorten rows that are too long."""
    return x / (x.square().mean(-1, keepdim=True).sqrt() / radius).clamp_min(1)


def worst_ratio(
    model: nn.Module, shape: tuple[int, int, int], radius: float, steps: int = 60, seed: int = 0
) -> float:
    """The largest |f(x) - f(y)| / |x - y| over pairs (k, t, n), moved along the gradient of its logarithm."""
    generator = torch.Generator().manual_seed(seed)
    x = within(torch.randn(shape, generator=generator, dtype=torch.float64), radius)
    size = torch.logspace(-4, 0.3, shape[0], dtype=torch.float64).view(-1, 1, 1)
    y = within(x + radius * size * torch.randn(shape, generator=generator, dtype=torch.float64), radius)
    best = 0.0
    for _ in range(steps):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        ratio = norm(model(x) - model(y)) / norm(x - y)
        best = max(best, float(ratio.detach().max()))
        steps_ = torch.autograd.grad(ratio.log().sum(), (x, y))
        length = 0.1 * norm((x - y).detach()).view(-1, 1, 1)
        x, y = (
            within(at.detach() + length * step / norm(step).view(-1, 1, 1).clamp_min(1e-30), radius)
            for at, step in zip((x, y), steps_, strict=True)
        )
    return best


def bound(model: nn.Module, radius: float = math.inf) -> float:
    return lipschitz_bound(model.eval(), radius=radius).totals["bound"]


def transformer(width: int = 8, heads: int = 2, blocks: int = 2, scale: float = 1.0) -> nn.Sequential:
    share = 1 / (2 * blocks)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(blocks):
        mlp = nn.Sequential(nn.Linear(width, 2 * width), UnitGelu(), nn.Linear(2 * width, width))
        layers += [Blend(BoundedAttention(width, heads, scale=scale), share), Blend(mlp, share)]
    return nn.Sequential(*layers, nn.Linear(width, width)).double().eval()


def test_one_linear_layer_is_exact():
    layer = nn.Linear(5, 9).double()
    s, vt = torch.linalg.svd(layer.weight.detach())[1:]
    x = draw(5)
    wanted = float(s[0]) * math.sqrt(5 / 9)
    assert bound(layer) == pytest.approx(wanted, rel=1e-8)
    y = x + vt[0]
    assert float(norm((layer(x) - layer(y)).detach()[None]) / norm((x - y)[None])) == pytest.approx(
        wanted, rel=1e-9
    )


@pytest.mark.parametrize(
    ("layer", "slope"),
    [(nn.GELU(), GELU_SLOPE), (nn.SiLU(), SILU_SLOPE), (nn.Tanh(), 1), (nn.Sigmoid(), 0.25), (UnitGelu(), 1)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_slopes_of_activations_are_the_largest_on_a_grid(layer: nn.Module, slope: float):
    x = torch.linspace(-6, 6, 200001, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    assert float(found.abs().max()) == pytest.approx(slope, rel=1e-7)
    assert float(found.abs().max()) <= slope * (1 + 1e-12)


ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU(), nn.ELU(2.0), nn.LeakyReLU(-3.0)]
ACTIVATIONS += [nn.Hardtanh(0.5, 2.0), nn.Identity(), nn.Dropout(0.5), UnitGelu()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda each: type(each).__name__)
def test_no_pair_of_inputs_passes_the_bound_of_a_network(activation: nn.Module):
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 6))
    low = StructuredLinear(LowRank(draw(5, 2), draw(2, 6)), draw(5))
    model = nn.Sequential(Blend(inner, 0.5, 1.0), low).double().eval()
    report = lipschitz_bound(model, radius=2.0)
    worst = worst_ratio(model, (60, 1, 6), 2.0, steps=30)
    assert 0.2 * report.totals["bound"] < worst <= report.totals["bound"]
    x = within(4 * torch.randn(2000, 1, 6, dtype=torch.float64), 2.0)
    assert float(norm(model(x)).detach().max()) <= report.totals["size"]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_no_pair_of_inputs_passes_the_bound_of_attention(causal: bool, scale: float):
    torch.manual_seed(2)
    layer = BoundedAttention(6, 2, scale=scale, causal=causal)
    layer.value[1] = StructuredLinear(LowRank(draw(3, 2), draw(2, 6)), draw(3))
    layer.double().eval()
    for radius in (0.5, 3.0):
        worst, report = worst_ratio(layer, (50, 4, 6), radius), lipschitz_bound(layer, radius=radius)
        assert worst <= report.totals["bound"]
        x = within(9 * torch.randn(500, 4, 6, dtype=torch.float64), radius)
        assert float(norm(layer(x)).detach().max()) <= report.totals["size"]
    if scale > 1:  # the control: the part that the values alone give is passed
        layer.scale = 0.0
        assert worst > bound(layer, radius)


def test_attention_is_its_formula_and_its_bound_too():
    layer, x, a, scale = BoundedAttention(6, 3, scale=1.7).double().eval(), draw(5, 6), 1.3, 1.7
    heads, slopes = [], []
    for q, k, v in zip(layer.query, layer.key, layer.value, strict=True):
        logits = (q(x) @ k(x).mT) * scale / 2
        logits[torch.ones(5, 5).triu(1).bool()] = -math.inf
        heads.append(logits.softmax(-1) @ v(x))
        sizes = [float(torch.linalg.svdvals(each.weight.detach())[0]) * math.sqrt(6 / 2) for each in (q, k, v)]
        slopes.append(sizes[2] + 2 * a**2 * math.prod(sizes) * scale)
    torch.testing.assert_close(layer(x), torch.cat(heads, -1) @ layer.output.weight.mT / 3)
    last = float(torch.linalg.svdvals(layer.output.weight.detach())[0])
    wanted = math.sqrt(sum(s * s for s in slopes) / 3) * last / 3
    assert bound(layer, a) == pytest.approx(wanted, rel=1e-7)


def test_whole_matrices_are_not_enough_for_heads():
    """One head that takes all: its norm is sqrt(heads) times that of the whole matrix."""
    layer = BoundedAttention(8, 4).double()
    for part in (layer.query, layer.key, layer.value):
        for head in part:
            nn.init.zeros_(head.weight)
    nn.init.eye_(layer.value[0].weight)
    nn.init.eye_(layer.output.weight)
    assert bound(layer, 1.0) == pytest.approx(math.sqrt(4) / math.sqrt(4) / 3)
    assert lipschitz_bound(layer.eval(), radius=1.0).rows[-1]["bound"] == pytest.approx(1)


def test_blends_of_unit_blocks_do_not_grow_with_depth():
    for blocks in (1, 4, 16):
        model = transformer(blocks=blocks)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                with torch.no_grad():
                    scale = math.sqrt(layer.in_features / layer.out_features)
                    layer.weight /= torch.linalg.matrix_norm(layer.weight, 2) * scale
                    layer.bias = None
        assert 0.8 < bound(model, 1.0) <= 1 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_trained_transformer_keeps_to_its_certificate(scale: float):
    """Trained with capped weights."""
    model = transformer(scale=scale)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    limit = 2.0
    optimizer = Optimizer([(matrices + others, lipschitz(limit=limit))], lr=0.05)
    x = within(draw(6, 5, 8), 1.0)
    target = draw(6, 5, 8, seed=1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    report = lipschitz_bound(model, radius=1.0)
    linear = [row for row in report.rows if row["kind"] == "Linear"]
    assert all(row["bound"] <= limit * (1 + 1e-6) for row in linear)
    worst = worst_ratio(model, (120, 5, 8), 1.0, steps=40)
    assert 1 < worst <= report.totals["bound"]
    x = within(9 * torch.randn(300, 5, 8, dtype=torch.float64), 1.0)
    assert float(norm(model(x)).detach().max()) <= report.totals["size"]


def test_a_compressed_network_has_a_certificate_that_is_not_larger():
    """Truncated weights have no larger norms; the heads of attention are layers like others."""
    model = transformer()
    before = bound(model, 1.0)
    rankwise.compress(model, rankwise.compressors.PlainSvd(), keep=0.8)
    assert any(type(layer) is StructuredLinear for layer in model.modules())
    after = bound(model, 1.0)
    assert worst_ratio(model, (40, 5, 8), 1.0, steps=20) <= after <= before * (1 + 1e-9)


def _hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, inputs, output: 9 * output)
    return layer


def _rewritten() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = lambda x: 9 * x
    return layer


def _not_finite() -> nn.Module:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, math.nan)
    return layer


def _huge() -> nn.Module:
    layers = [nn.Linear(1, 1).double() for _ in range(4)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1e100)
    return nn.Sequential(*layers)


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 9 * super().forward(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "normalisation": (lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), r"^1 is LayerNorm.*eps"),
    "attention": (lambda: nn.MultiheadAttention(2, 1), "BoundedAttention"),
    "a subclass": (lambda: Blend(Louder(2, 2), 0.5), "^block is Louder: what it computes is not known"),
    "hooks": (_hooked, "has hooks"),
    "another forward": (_rewritten, "has hooks"),
    "weights that are parametrised": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
        "ParametrizedLinear",
    ),
    "an approximation": (lambda: nn.GELU(approximate="tanh"), "approximation"),
    "attention of any input": (lambda: BoundedAttention(4, 2), "give radius"),
    "not finite": (_not_finite, "no finite values"),
    "no number": (_huge, "beyond all finite numbers"),
    "a convolution": (lambda: nn.Conv2d(1, 1, 3), "Conv2d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str):
    make, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        lipschitz_bound(make().eval())


def test_bad_arguments():
    with pytest.raises(ValueError, match="training mode"):
        lipschitz_bound(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="radius"):
        lipschitz_bound(nn.Linear(2, 2).eval(), radius=0)
    with pytest.raises(ValueError, match="heads"):
        BoundedAttention(5, 2)


def test_the_report_names_all_and_is_plain():
    report = rankwise.lipschitz_bound(transformer(), radius=1.0)
    assert [row["name"] for row in report.rows][:4] == [".", "0", "0.block", "0.block.query.0"]
    assert "log10" in report.to_json()
    whole = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    assert "null" in lipschitz_bound(whole).to_json()
    with torch.no_grad():
        whole[0].weight.zero_()
    assert lipschitz_bound(whole).totals["log10"] is None


def test_a_layer_that_stands_twice_counts_twice():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = 3 * torch.eye(4)
    assert lipschitz_bound(nn.Sequential(layer, nn.ReLU(), layer).eval()).totals["bound"] == pytest.approx(9)


def test_a_part_in_training_mode_is_refused():
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    network[1].train()
    with pytest.raises(ValueError, match="training mode"):
        lipschitz_bound(network)
