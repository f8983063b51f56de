"""Every block against the metric written out, in float64; and what one step does to a quadratic loss."""

import pytest
import torch
from contracts.examples import EXAMPLES, draw
from torch import Tensor, nn
from torch.func import functional_call

from rankwise.matrices import Dense, LowRank, PivotedLowRank, Product, Scaled, Sparse, StructuredMatrix, Sum
from rankwise.preconditioners.blocks import BiasBlock, ScaledBlock, blocks_of, side_of
from rankwise.preconditioners.natural_gradient import NaturalGradient

EXACT = ["Dense", "Diagonal", "LowRank", "PivotedLowRank"]
DIAGONAL = ["Quantized", "Sparse"]
MOMENTS = {4: draw(9, 4, seed=5), 5: draw(9, 5, seed=6)}


def moment(n: int) -> Tensor:
    return MOMENTS[n].mT @ MOMENTS[n] / 9


def sides(matrix: StructuredMatrix):
    return side_of(moment(matrix.shape[0]), 1e-2), side_of(moment(matrix.shape[1]), 1e-2)


def written_out(matrix: StructuredMatrix, parameters: tuple[nn.Parameter, ...]) -> tuple[Tensor, Tensor]:
    """The Jacobian of the matrix's entries by some of its numbers, and the metric of all entries."""
    names = {id(p): name for name, p in matrix.named_parameters()}
    values = {names[id(p)]: p.detach() for p in parameters}

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = matrix

        def forward(self):
            return self.inner.dense()

    def entries(chosen):
        return functional_call(Written(), {f"inner.{k}": v for k, v in chosen.items()}, ())

    jacobian = torch.autograd.functional.jacobian(
        lambda *v: entries(dict(zip(values, v, strict=True))), tuple(values.values())
    )
    jacobian = dict(zip(values, jacobian, strict=True))
    columns = [jacobian[names[id(p)]].reshape(matrix.shape[0] * matrix.shape[1], -1) for p in parameters]
    outputs, inputs = sides(matrix)
    return torch.cat(columns, 1), torch.kron(outputs.moment, inputs.moment)


def flat(parts) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def examples(names) -> list[StructuredMatrix]:
    found = [EXAMPLES[name]() for name in names]
    if "PivotedLowRank" in names:
        found.append(PivotedLowRank.from_factors(draw(4, 2, seed=7), draw(2, 5, seed=8)))  # rows, not columns
    return found


@pytest.mark.parametrize("matrix", examples(EXACT), ids=lambda matrix: f"{type(matrix).__name__}{matrix.shape}")
def test_a_change_is_the_metrics_inverse_times_the_gradient(matrix):
    (block,) = blocks_of(matrix, *sides(matrix))
    jacobian, metric = written_out(matrix, block.parameters)
    weight_gradient = draw(*matrix.shape, seed=9)
    (matrix.dense() * weight_gradient).sum().backward()
    before, step = matrix.dense().detach().clone(), 1e-7
    with torch.no_grad():
        block.move(block.solve(block.gradients()), step)
        moved = (matrix.dense() - before) / step
    gradient = jacobian.mT @ weight_gradient.reshape(-1)
    expected = jacobian @ torch.linalg.pinv(jacobian.mT @ metric @ jacobian) @ gradient
    torch.testing.assert_close(moved.reshape(-1), expected, rtol=1e-4, atol=1e-5)


def trained(matrix: StructuredMatrix, loss_of, **options) -> list[Tensor]:
    """The matrix after each of some natural-gradient steps."""
    optimizer = NaturalGradient(list(blocks_of(matrix, *sides(matrix))), **options)
    places = []
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(matrix.dense()).backward()
        optimizer.step()
        places.append(matrix.dense().detach())
    return places


def test_both_gauges_go_the_same_way():
    factors, to = (draw(4, 2, seed=3), draw(2, 5, seed=4)), draw(4, 5, seed=5)
    transposed = factors[1].mT.contiguous(), factors[0].mT.contiguous()
    rows, columns = PivotedLowRank.from_factors(*factors), PivotedLowRank.from_factors(*transposed)
    assert (rows.side, columns.side) == ("rows", "columns")
    options = {"lr": 0.1, "momentum": 0.7, "trust": 0.05}
    expected = trained(LowRank(*factors), lambda w: (w - to).pow(4).sum(), **options)
    for found in (
        trained(rows, lambda w: (w - to).pow(4).sum(), **options),
        [w.mT for w in trained(columns, lambda w: (w.mT - to).pow(4).sum(), **options)],
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((expected[-1] - expected[0]).norm()) > 0.1


@pytest.mark.parametrize("matrix", examples(DIAGONAL), ids=lambda matrix: type(matrix).__name__)
def test_numbers_taken_alone_see_the_diagonal(matrix):
    (block,) = blocks_of(matrix, *sides(matrix))
    jacobian, metric = written_out(matrix, block.parameters)
    change = block.solve([torch.ones_like(p) for p in block.parameters])
    torch.testing.assert_close(1 / flat(change), (jacobian.mT @ metric @ jacobian).diagonal())


@pytest.mark.parametrize(
    "matrix",
    [
        Product(Dense(draw(5, 3)), Sparse.from_dense(draw(3, 4, seed=1) * (draw(3, 4, seed=2) > 0))),
        Scaled(Sum(Dense(draw(5, 4)), LowRank(draw(5, 2, seed=1), draw(2, 4, seed=2))), -0.3),
    ],
    ids=lambda matrix: type(matrix).__name__,
)
def test_parts_see_the_metric_through_the_others(matrix):
    blocks = list(blocks_of(matrix, *sides(matrix)))
    assert len(blocks) == 2
    for block in blocks:
        jacobian, metric = written_out(matrix, block.parameters)
        gradient = jacobian.mT @ draw(*matrix.shape, seed=9).reshape(-1)
        split = gradient.split([p.numel() for p in block.parameters])
        change = block.solve([g.view(p.shape) for g, p in zip(split, block.parameters, strict=True)])
        full = jacobian.mT @ metric @ jacobian
        if len(block.parameters) == 1 and block.parameters[0].dim() == 1:
            full = full.diagonal().diag()
        expected = torch.linalg.pinv(full) @ gradient
        torch.testing.assert_close(jacobian @ flat(change), jacobian @ expected, rtol=1e-4, atol=1e-6)


def test_an_unknown_kind_is_named():
    class Odd(StructuredMatrix):
        shape, macs = (2, 2), 0

        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x

        dense = spec = empty = forward

    with pytest.raises(ValueError, match="metric of Odd is not known; heal with Adam"):
        list(blocks_of(Odd(), side_of(torch.eye(2), 0.1), side_of(torch.eye(2), 0.1)))


def quadratic(weight: Tensor, bias: Tensor, to: Tensor, to_bias: Tensor, outputs, inputs) -> Tensor:
    change, shift = weight - to, bias - to_bias
    parts = torch.trace(outputs.moment @ change @ inputs.moment @ change.mT), shift @ outputs.moment @ shift
    return (parts[0] + parts[1]) / 2


def test_a_full_step_minimises_a_quadratic_loss():
    matrix, bias = Dense(draw(5, 4)), nn.Parameter(draw(5))
    outputs, inputs = sides(matrix)
    blocks = [*blocks_of(matrix, outputs, inputs), BiasBlock(bias, outputs)]
    optimizer = NaturalGradient(blocks, lr=1.0, momentum=0.0, trust=1e9)
    to, to_bias = draw(5, 4, seed=3), draw(5, seed=4)
    quadratic(matrix.dense(), bias, to, to_bias, outputs, inputs).backward()
    optimizer.step()
    torch.testing.assert_close(matrix.weight.detach(), to)
    torch.testing.assert_close(bias.detach(), to_bias)


@pytest.mark.parametrize("kind", [LowRank, PivotedLowRank])
def test_steps_find_the_best_matrix_of_a_rank(kind):
    """The optimum is the truncated SVD in the metric, whose error is the sum of the squares left out."""
    outputs, inputs = side_of(moment(5), 1e-2), side_of(moment(4), 1e-3)
    to, none = draw(5, 4, seed=3), torch.zeros(5, dtype=torch.float64)
    matrix = kind.from_factors(draw(5, 2), draw(2, 4))
    optimizer = NaturalGradient(list(blocks_of(matrix, outputs, inputs)), lr=0.5, momentum=0.0, trust=1e9)
    for _ in range(300):
        optimizer.zero_grad()
        loss = quadratic(matrix.dense(), none, to, none, outputs, inputs)
        loss.backward()
        optimizer.step()
    roots = [torch.linalg.cholesky(side.moment) for side in (outputs, inputs)]
    left_out = torch.linalg.svdvals(roots[0].mT @ to @ roots[1])[2:]
    assert loss.item() == pytest.approx(float(left_out.square().sum() / 2), rel=1e-6)


def test_a_step_is_no_longer_than_trusted():
    matrix = Dense(draw(5, 4))
    outputs, inputs = sides(matrix)
    optimizer = NaturalGradient(list(blocks_of(matrix, outputs, inputs)), lr=1.0, momentum=0.0, trust=1e-3)
    before, none = matrix.weight.detach().clone(), torch.zeros(5, dtype=torch.float64)
    quadratic(matrix.dense(), none, draw(5, 4, seed=3), none, outputs, inputs).backward()
    optimizer.step()
    moved = quadratic(matrix.weight.detach(), none, before, none, outputs, inputs)
    assert float(moved) == pytest.approx(1e-3)


def test_momentum_is_a_mean_of_the_gradients():
    matrix = Dense(torch.zeros(1, 1, dtype=torch.float64))
    one = side_of(torch.ones(1, 1), 1e-12)
    optimizer = NaturalGradient(list(blocks_of(matrix, one, one)), lr=1.0, momentum=0.5, trust=1e9)
    places = []
    for gradient in (1.0, 3.0):
        matrix.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        places.append(matrix.weight.item())
    assert places == pytest.approx([-1.0, -1.0 - (0.5 * 1 + 1 * 3) / 1.5])


def test_numbers_without_a_metric_go_as_in_adam():
    ours, theirs = nn.Parameter(draw(5)), nn.Parameter(draw(5))
    optimizer = NaturalGradient([ScaledBlock(ours, 0.5)], lr=0.02, momentum=0.9, trust=1e9)
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.9), eps=0.0)
    for i in range(4):
        ours.grad, theirs.grad = draw(5, seed=i), draw(5, seed=i)
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)
