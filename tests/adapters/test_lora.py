"""LoRA finds what its rank can hold, and drops inputs of its own branch alone."""

import pytest
import torch
from contracts.examples import draw
from torch import Generator
from torch.nn import functional

from rankwise.adapters import Lora
from rankwise.matrices import Base, Dense, StructuredMatrix

WEIGHT = draw(20, 16)


def attach(method: Lora) -> StructuredMatrix:
    return method.attach(Base(Dense(WEIGHT)), {}, Generator().manual_seed(0)).double()


@pytest.mark.parametrize("rank", [8, 4])
def test_the_squares_beyond_its_rank_are_what_is_left(rank: int):
    """Of a change of rank 8, after training to the end."""
    left, right = (torch.linalg.qr(draw(size, 8, seed=size))[0] for size in WEIGHT.shape)
    values = torch.linspace(3, 0.4, 8, dtype=torch.float64)
    target, adapted = WEIGHT + left * values @ right.mT, attach(Lora(rank=rank))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (adapted.dense() - target).square().sum()
        value.backward()
        return value.detach()

    optimizer.step(loss)
    assert float(loss()) == pytest.approx(float(values[rank:].square().sum()), rel=1e-9, abs=1e-9)


def test_inputs_of_the_branch_alone_are_dropped_and_only_while_it_trains():
    adapted, x = attach(Lora(rank=3, alpha=6.0, dropout=0.5)), draw(7, 16, seed=1)
    with torch.no_grad():
        for p in (p for p in adapted.parameters() if p.requires_grad):
            p += draw(*p.shape, seed=2)
        change = adapted.dense() - WEIGHT
        torch.testing.assert_close(adapted.eval()(x), x @ (WEIGHT + change).mT)
        torch.manual_seed(3)
        found = adapted.train()(x)
        torch.manual_seed(3)
        torch.testing.assert_close(found, x @ WEIGHT.mT + functional.dropout(x, 0.5) @ change.mT)


def test_long_rows_in_half_precision_keep_their_lengths():
    """Their squares are no numbers of that type."""
    base = Base(Dense(300 * draw(6, 4)))
    matrix = Lora(rank=2, magnitudes=True).attach(base, {}, Generator().manual_seed(0))
    wide, half = matrix.double().dense(), matrix.half().dense()
    torch.testing.assert_close(half.double(), wide, rtol=2e-3, atol=0)
