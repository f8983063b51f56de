"""Spectra of Jacobians and of the Fisher information: three ways to one number, and what theory says of them."""

import itertools
import math
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn
from torch.func import functional_call

import rankwise
from rankwise import fisher_spectrum, jacobian_spectrum, tangent_kernel
from rankwise.curvature import Categorical, Gaussian, OutputLaw

LAWS = [Categorical(), Gaussian()]


def network(*widths: int, seed: int = 0) -> nn.Sequential:
    """A tanh network in float64."""
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(n, m), nn.Tanh()]
        nn.init.normal_(
            layers[-2].weight, std=1 / math.sqrt(n), generator=torch.Generator().manual_seed(seed + i)
        )
        nn.init.normal_(layers[-2].bias, std=0.3, generator=torch.Generator().manual_seed(seed + i + 50))
    return nn.Sequential(*layers[:-1]).double()


def jacobians(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of all outputs by all parameters (t, k, P), by torch.func, and outputs (t, k)."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.jacrev(lambda p: functional_call(model, p, x))(params)
    return torch.cat([each.flatten(2) for each in found.values()], -1), model(x).detach()


def hessians(outputs: Tensor, law: OutputLaw) -> Tensor:
    """H (t, k, k), written out."""
    if isinstance(law, Gaussian):
        return torch.eye(outputs.shape[1]).double().expand(len(outputs), -1, -1)
    p = outputs.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def explicit(model: nn.Module, x: Tensor, law: OutputLaw) -> Tensor:
    """F, (P, P)."""
    j, outputs = jacobians(model, x)
    return torch.einsum("tkp,tkl,tlq->pq", j, hessians(outputs, law), j) / len(x)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_three_ways_give_one_spectrum(law: OutputLaw):
    model, x = network(6, 8, 7, 4), draw(9, 6, seed=3)
    wanted = torch.linalg.eigvalsh(explicit(model, x, law)).flip(0)
    lanczos = fisher_spectrum(model, [x[:5], x[5:]], count=3, law=law, tolerance=1e-8)
    dual = fisher_spectrum(model, [x[:2], x[2:]], count=None, law=law)
    values = torch.tensor([[row["eigenvalue"] for row in report.rows[:3]] for report in (lanczos, dual)])
    torch.testing.assert_close(values.double(), wanted[:3].expand(2, -1), rtol=1e-6, atol=0)
    rank = 9 * (3 if isinstance(law, Categorical) else 4)  # softmax does not see a shift of all logits
    assert len(dual.rows) == rank
    torch.testing.assert_close(
        torch.tensor(dual.curves["Fisher"], dtype=torch.float64), wanted[:rank], rtol=1e-6, atol=1e-12
    )
    single = fisher_spectrum(model.float(), [x.float()], count=None, law=law)
    assert len(single.rows) == rank
    assert single.totals["largest"] == pytest.approx(float(wanted[0]), rel=1e-5)
    assert lanczos.totals["outputs"] == dual.totals["outputs"] == 9
    assert lanczos.totals["params"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_square_roots_of_h_are_right(law: OutputLaw):
    outputs, eye = 2 * draw(5, 4), torch.eye(4).double()
    up = torch.stack([law.up(outputs, each.expand(5, 4)) for each in eye], -1)
    down = torch.stack([law.down(outputs, each.expand(5, 4)) for each in eye], -1)
    torch.testing.assert_close(up, down.mT)
    torch.testing.assert_close(up @ down, hessians(outputs, law))


def test_the_categorical_law_is_the_hessian_of_cross_entropy():
    logits = draw(1, 5)
    for label in range(5):
        target = torch.tensor([label])
        wanted = torch.autograd.functional.hessian(lambda z, t=target: nn.functional.cross_entropy(z, t), logits)
        torch.testing.assert_close(hessians(logits, Categorical())[0], wanted[0, :, 0])


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_one_sample_has_blocks_that_are_kronecker_products(law: OutputLaw, layer: int):
    """F of W^l is (D' H D) (x) (x x'), with x the layer's input and D = d output / d (W x + b)."""
    model, x = network(6, 8, 7, 4), draw(1, 6, seed=3)
    inputs = model[:layer](x).detach()
    before = model[: layer + 1](x).detach()
    d = torch.func.jacrev(lambda h: model[layer + 1 :](h))(before)[0, :, 0].detach()
    h = hessians(model(x).detach(), law)[0]
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    at = names.index(f"{layer}.weight")
    part = slice(sum(sizes[:at]), sum(sizes[: at + 1]))
    block = torch.kron(d.mT @ h @ d, inputs.mT @ inputs)
    torch.testing.assert_close(explicit(model, x, law)[part, part], block, rtol=1e-6, atol=1e-12)
    top = float(inputs.square().sum() * torch.linalg.eigvalsh(d.mT @ h @ d)[-1])
    found = fisher_spectrum(model, [x], law=law, names=[f"{layer}.weight"], tolerance=1e-7)
    assert found.totals["largest"] == pytest.approx(top, rel=1e-6)


def test_the_largest_of_a_mean_is_below_the_mean_of_the_largest():
    """And the top of F lies between the largest of its diagonal blocks and the sum of those."""
    model, x = network(6, 8, 7, 4), draw(7, 6, seed=3)
    options: dict[str, Any] = {"tolerance": 1e-8}
    whole = fisher_spectrum(model, [x], **options).totals["largest"]
    each = [fisher_spectrum(model, [row[None]], **options).totals["largest"] for row in x]
    assert whole < 0.9 * sum(each) / len(each)
    assert max(each) / len(each) < whole
    blocks = [
        fisher_spectrum(model, [x], names=[name], **options).totals["largest"]
        for name, _ in model.named_parameters()
    ]
    assert max(blocks) <= whole <= sum(blocks)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_tangent_kernel_is_the_gram_matrix(law: OutputLaw):
    model, x = network(5, 6, 3), draw(4, 5)
    j, outputs = jacobians(model, x)
    root = torch.stack([law.down(outputs, each.expand(4, 3)) for each in torch.eye(3).double()], -1)
    rows = (root @ j).flatten(0, 1)
    torch.testing.assert_close(tangent_kernel(model, x, law=law), rows @ rows.mT)


class Tokens(nn.Module):
    """Logits of sequences, behind attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.block(self.table(input_ids)))}


def test_language_models_are_means_over_tokens_without_padding():
    """With attention, dropout, shared weights and masks; the model is as it was afterwards."""
    torch.manual_seed(0)
    model, ids = Tokens().double().train(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model.head.weight.requires_grad_(False)
    batch = {"input_ids": ids, "attention_mask": mask}
    one = fisher_spectrum(model, [batch], count=2, tolerance=1e-8)
    two = fisher_spectrum(model, [batch], count=None)
    assert one.totals["outputs"] == two.totals["outputs"] == 6
    assert one.totals["params"] == sum(p.numel() for p in model.parameters())
    for a, b in zip(one.rows, two.rows, strict=False):
        assert a["eigenvalue"] == pytest.approx(b["eigenvalue"], rel=1e-6)
    assert model.training
    assert not model.head.weight.requires_grad
    assert model.block.linear1.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    report = jacobian_spectrum(model, {"input_ids": ids[:, :1]}, after="table")
    assert report.title.startswith("Jacobians (11, 8) of 2 samples")


@pytest.mark.parametrize("widths", [(6, 8, 7, 4), (4, 9, 6)])
def test_jacobians_are_those_of_torch(widths: tuple[int, ...]):
    model, x = network(*widths), draw(3, widths[0], seed=1)
    exact = jacobian_spectrum(model, x)
    top = jacobian_spectrum(model, x, count=2, tolerance=1e-9)
    for i, each in enumerate(x):
        wanted = torch.linalg.svdvals(torch.func.jacrev(model)(each)).detach()
        torch.testing.assert_close(torch.tensor(exact.curves[f"sample {i}"], dtype=torch.float64), wanted)
        torch.testing.assert_close(torch.tensor(top.curves[f"sample {i}"], dtype=torch.float64), wanted[:2])
        row = exact.rows[i]
        assert (row["largest"], row["smallest"]) == pytest.approx((float(wanted[0]), float(wanted[-1])))
        assert row["rms"] == pytest.approx(float(wanted.square().mean().sqrt()))
    assert exact.totals["largest"] == pytest.approx(sum(row["largest"] for row in exact.rows) / 3)


def test_jacobians_from_a_layer_on():
    model, x = network(6, 8, 7, 4), draw(2, 6)
    found = jacobian_spectrum(model, x, after="2")
    for i, h in enumerate(model[:3](x)):
        wanted = torch.linalg.svdvals(torch.func.jacrev(model[3:])(h))
        torch.testing.assert_close(torch.tensor(found.curves[f"sample {i}"], dtype=torch.float64), wanted)


class Turned(nn.Module):
    """A convolution whose channels become the last axis, and so an output that is no contiguous tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mT


@pytest.mark.parametrize("count", [None, 20])
def test_jacobians_of_outputs_that_are_not_contiguous(count: int | None):
    torch.manual_seed(0)
    model, x = Turned().double(), draw(2 * 3, 5).view(2, 3, 5)
    found = jacobian_spectrum(model, x, count=count, tolerance=1e-12)
    wanted = torch.linalg.svdvals(torch.func.jacrev(lambda one: model(one[None])[0].flatten())(x[0]).flatten(1))
    for values in found.curves.values():
        torch.testing.assert_close(torch.tensor(values[:15]).double(), wanted, rtol=1e-6, atol=1e-6)


class Columns(nn.Linear):
    """A linear layer that computes its output by columns."""

    def forward(self, input: Tensor) -> Tensor:
        return (self.weight @ input.mT).mT


def test_fisher_information_of_outputs_that_are_not_contiguous():
    model, x = Columns(4, 3).double(), draw(5, 4)
    assert not model(x).is_contiguous()
    plain = nn.Linear(4, 3, bias=False).double()
    plain.load_state_dict({"weight": model.weight})
    found, wanted = (fisher_spectrum(each, [x], count=None).curves["Fisher"] for each in (model, plain))
    assert found == pytest.approx(wanted)


def test_a_first_operation_may_write_into_its_input():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)).double(), draw(3, 4)
    before, plain = x.clone(), nn.Sequential(nn.ReLU(), model[1])
    assert jacobian_spectrum(model, x).curves == jacobian_spectrum(plain, x).curves
    assert torch.equal(x, before)


class Several(nn.Linear):
    """A layer that returns more than its output."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


def test_models_that_return_tuples_or_work_in_half_precision_are_refused():
    with pytest.raises(ValueError, match="must return a floating-point tensor"):
        fisher_spectrum(Several(3, 4), [draw(2, 3).float()])
    model, x = network(6, 8, 3).bfloat16(), draw(9, 6).bfloat16()
    mixed = nn.Sequential(network(6, 8).float(), nn.Tanh())
    for count in (None, 2):
        with pytest.raises(ValueError, match="too rough"):
            fisher_spectrum(model, [x], count=count)
        with pytest.raises(ValueError, match="too rough"):
            jacobian_spectrum(model, x, count=count)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="too rough"):
            fisher_spectrum(mixed, [x.float()], count=count)
    with pytest.raises(ValueError, match="too rough"):
        tangent_kernel(model, x)


def test_singular_values_are_not_eigenvalues():
    """Powers of J itself would find one; J' J finds ten."""
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.tensor([[1.0, 10.0], [0.0, 1.0]]).double()
    wanted = float(torch.linalg.matrix_norm(model.weight.detach(), 2))
    assert jacobian_spectrum(model, draw(1, 2), count=1).totals["largest"] == pytest.approx(wanted)
    assert wanted > 10


def deep(depth: int, width: int, orthogonal: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
    for layer in layers:
        if orthogonal:
            nn.init.orthogonal_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=width**-0.5)
    return nn.Sequential(*layers).double()


def test_deep_linear_orthogonal_networks_are_isometric_and_gaussian_ones_are_not():
    report = jacobian_spectrum(deep(100, 16, True), draw(1, 16))
    assert report.rows[0]["largest"] == pytest.approx(1, abs=1e-5)  # float32 weights made them
    assert report.rows[0]["smallest"] == pytest.approx(1, abs=1e-5)
    exact = deep(100, 16, True)
    with torch.no_grad():
        for layer in exact:
            layer.weight.copy_(torch.linalg.qr(layer.weight).Q)
    report = jacobian_spectrum(exact, draw(1, 16))
    assert max(abs(value - 1) for value in report.curves["sample 0"]) < 1e-12
    assert jacobian_spectrum(exact, draw(1, 16), count=3).curves["sample 0"] == pytest.approx([1, 1, 1])
    spreads = []
    for depth in (10, 40):
        row = jacobian_spectrum(deep(depth, 16, False), draw(1, 16)).rows[0]
        spreads.append(math.log(row["largest"] / row["median"]))
    assert spreads[1] > 2 * spreads[0] > 2


def test_two_over_the_largest_is_the_edge_of_stability():
    """Gradient descent on half the mean squared error of a linear model, where F is the Hessian."""
    x, model = draw(30, 6), nn.Linear(6, 2, bias=False).double()
    edge = 2 / fisher_spectrum(model, [x], law=Gaussian(), tolerance=1e-9).totals["largest"]
    losses = {}
    for factor in (0.99, 1.01):
        weight = draw(2, 6, seed=4)
        for _ in range(2000):
            weight = weight - factor * edge * (weight @ x.mT @ x) / len(x)
        losses[factor] = float((x @ weight.mT).square().sum())
    assert losses[0.99] < 1e-6
    assert losses[1.01] > 1e6


def test_bad_arguments_are_refused():
    model, x = network(4, 3), draw(2, 4)
    with pytest.raises(ValueError, match="there is no batch"):
        fisher_spectrum(model, [])
    with pytest.raises(ValueError, match=r"give a list of batches, such as \[x\]"):
        fisher_spectrum(model, x)
    with pytest.raises(ValueError, match="outputs must be"):
        fisher_spectrum(model, [x[0]])
    with pytest.raises(ValueError, match="no parameter 'other'"):
        fisher_spectrum(model, [x], names=["other"])
    with pytest.raises(ValueError, match="no parameters to differentiate by"):
        fisher_spectrum(nn.Tanh(), [x])
    with pytest.raises(ValueError, match="count"):
        fisher_spectrum(model, [x], count=0)
    with pytest.raises(ValueError, match="tolerance must be >= 0"):
        jacobian_spectrum(model, x, tolerance=math.nan)
    with pytest.raises(ValueError, match="floating-point tensor; or name a module"):
        jacobian_spectrum(model, [x])
    with pytest.raises(ValueError, match="samples are the first axis"):
        jacobian_spectrum(model, x[0])
    with pytest.raises(ValueError, match="ran 2 times"):
        jacobian_spectrum(nn.Sequential(inner := nn.Linear(4, 4).double(), inner), x, after="0")
    model[0].weight.data[0, 0] = math.inf
    for options in ({"count": None}, {"count": 1}):
        with pytest.raises(FloatingPointError, match="not finite"):
            fisher_spectrum(model, [x], **options)
        with pytest.raises(FloatingPointError, match="not finite"):
            jacobian_spectrum(nn.Sequential(model, nn.Tanh(), nn.Linear(3, 3).double()), x.exp(), **options)


def test_they_are_exported():
    assert {"fisher_spectrum", "jacobian_spectrum", "tangent_kernel"} <= set(rankwise.__all__)
