"""Adapters on the factors of a compressed weight: the same structure, exact merging, tangent directions."""

import pytest
import torch
from contracts.examples import draw
from torch import Generator, nn

import rankwise
from rankwise.adapters import FactorLora, Lora
from rankwise.core.surgery import structured
from rankwise.matrices import (
    Base,
    ChangedFactors,
    Dense,
    LowRank,
    PivotedLowRank,
    Quantized,
    StructuredMatrix,
    Sum,
)


def moved(matrix: StructuredMatrix) -> StructuredMatrix:
    with torch.no_grad():
        for i, parameter in enumerate(p for p in matrix.parameters() if p.requires_grad):
            parameter.add_(0.3 * draw(*parameter.shape, seed=i))
    return matrix


def attached(base: StructuredMatrix, **fields) -> ChangedFactors:
    made = FactorLora(**fields).attach(Base(base), {}, Generator().manual_seed(0))
    assert isinstance(made, ChangedFactors)
    return moved(made.double())


def test_each_factor_gets_its_own_low_rank_change():
    base = LowRank(draw(9, 4), draw(4, 7, seed=1))
    made = attached(base, rank=2, alpha=6.0)
    one, other = (change.matrix for change in made.changes)
    left = base.left + 3 * one.left @ one.right
    right = base.right + 3 * other.left @ other.right
    torch.testing.assert_close(made.dense(), left @ right)
    assert [change.matrix.rank for change in made.changes] == [2, 2]


@pytest.mark.parametrize(
    "base",
    [
        LowRank(draw(9, 4), draw(4, 7, seed=1)),
        PivotedLowRank.from_factors(draw(9, 4), draw(4, 7, seed=1)),
        PivotedLowRank.from_factors(draw(5, 4), draw(4, 7, seed=1)),  # a mix of one line: its change has rank 1
        Sum(
            Quantized.from_codes(
                torch.arange(63).view(9, 7) % 8, draw(9, 2), draw(9, 2, seed=1), bits=3, group=4
            ),
            LowRank(draw(9, 2), draw(2, 7, seed=1)),
        ),
    ],
)
def test_merging_is_exact_and_keeps_the_form(base: StructuredMatrix):
    made = attached(base, rank=3)
    merged = made.merged()
    assert (merged.spec(), merged.params) == (base.spec(), base.params)
    torch.testing.assert_close(merged.dense(), made.dense(), rtol=1e-12, atol=1e-12)
    assert float((merged.dense() - base.dense()).norm()) > 0.1


def test_the_rank_stays_where_lora_raises_it():
    base = LowRank(draw(9, 4), draw(4, 7, seed=1))
    beside = moved(Lora(rank=2).attach(Base(base), {}, Generator()).double())
    assert int(torch.linalg.matrix_rank(attached(base, rank=2).dense())) == 4
    assert int(torch.linalg.matrix_rank(beside.dense())) == 6


@pytest.mark.parametrize(("method", "tangent"), [(FactorLora(rank=2), True), (Lora(rank=2), False)])
def test_first_directions_keep_the_rank(method: FactorLora | Lora, tangent: bool):
    """Of a small change that is tangent, nothing is outside the columns of U and the rows of V on both sides."""
    base = LowRank(draw(9, 4), draw(4, 7, seed=1))
    made = method.attach(Base(base), {}, Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(1e-6 * draw(*parameter.shape, seed=3))
        first = made.dense() - base.dense()
        outside = torch.eye(9) - base.left @ torch.linalg.pinv(base.left)
        beyond = torch.eye(7) - torch.linalg.pinv(base.right) @ base.right
        share = float((outside @ first @ beyond).norm() / first.norm())
    assert share < 1e-5 if tangent else share > 0.1


def test_an_ordinary_weight_gets_a_lora():
    made = FactorLora(rank=2).attach(Base(Dense(draw(9, 7))), {}, Generator())
    again = Lora(rank=2).attach(Base(Dense(draw(9, 7))), {}, Generator())
    assert made.spec() == again.spec()


def test_steps_below_half_precision_count():
    base = LowRank(draw(9, 4).bfloat16(), draw(4, 7, seed=1).bfloat16())
    made = FactorLora(rank=2).attach(Base(base), {}, Generator().manual_seed(0))
    assert isinstance(made, ChangedFactors)
    with torch.no_grad():
        for change in made.changes:
            change.matrix.left.copy_(1e-4 * draw(*change.matrix.left.shape, seed=3))
        x = draw(3, 7, seed=5).float()
        one, other = (change.dense().double() for change in made.changes)
        before = x.double() @ (base.left.double() @ base.right.double()).mT
        after = x.double() @ ((base.left.double() + one) @ (base.right.double() + other)).mT
        assert float((made(x) - after).norm()) < 0.02 * float((after - before).norm())
    assert made(x.bfloat16()).dtype == torch.bfloat16


def test_what_has_no_factors_is_refused():
    codes = Quantized.from_codes(torch.arange(20).view(5, 4) % 8, draw(5, 2), draw(5, 2), bits=3, group=3)
    with pytest.raises(ValueError, match="a Quantized has no factors; use Lora"):
        FactorLora(rank=2).attach(Base(codes), {}, Generator())


def test_a_compressed_model_trains_and_keeps_its_size():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    rankwise.compress(net, rankwise.compressors.PlainSvd(), keep=0.6)
    before = {name: layer.matrix.spec() for name, layer in structured(net).items()}
    rankwise.adapt(net, FactorLora(rank=2))
    x, y = torch.randn(64, 16), torch.randn(64, 8)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    outputs = net(x)
    report = rankwise.absorb(net)
    assert losses[-1] < losses[0]
    assert {name: layer.matrix.spec() for name, layer in structured(net).items()} == before
    assert report.totals["params_after"] == report.totals["params_before"]
    torch.testing.assert_close(net(x), outputs)
