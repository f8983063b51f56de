"""A few numbers beside a weight, of a rank that LoRA would pay more for."""

import pytest
import torch
from contracts.examples import draw
from torch import Generator, nn

import rankwise
from rankwise.adapters import KronLora, Lora
from rankwise.core.methods import Adapter
from rankwise.matrices import Base, Dense, StructuredMatrix


def attach(method: Adapter, m: int, n: int) -> StructuredMatrix:
    return method.attach(Base(Dense(torch.zeros(m, n).double())), {}, Generator().manual_seed(0))


def trained(matrix: StructuredMatrix) -> list[torch.nn.Parameter]:
    return [p for p in matrix.parameters() if p.requires_grad]


def test_its_numbers_are_loras_and_those_of_the_mixers_and_its_rank_is_higher():
    ours, lora = attach(KronLora(count=4, rank=2), 64, 48), attach(Lora(rank=2), 64, 48)
    counts = [sum(p.numel() for p in trained(matrix)) for matrix in (ours, lora)]
    assert counts[0] == counts[1] + 4**3
    for matrix in (ours, lora):
        for i, p in enumerate(trained(matrix)):
            p.data = draw(*p.shape, seed=i)
    assert [int(torch.linalg.matrix_rank(matrix.dense())) for matrix in (ours, lora)] == [32, 2]


def test_one_term_is_lora():
    ours = attach(KronLora(count=1, rank=3, scale=0.5), 6, 4)
    mixers, left, right = trained(ours)
    left.data = draw(*left.shape)
    torch.testing.assert_close(ours.dense(), 0.5 * mixers[0, 0, 0] * left[0] @ right[0])


def test_at_the_start_only_what_is_zero_has_a_gradient():
    ours = attach(KronLora(count=2, rank=1), 6, 4)
    (ours(draw(3, 4)) - draw(3, 6, seed=1)).square().sum().backward()
    assert [bool(p.grad.any()) for p in trained(ours)] == [False, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"count": 5}, "count 5 must divide"), ({"count": 2, "rank": 4}, "lower rank"), ({"count": 0}, ">= 1")],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        attach(KronLora(**fields), 12, 6)


@pytest.mark.parametrize(("name", "value"), [("scale", 0.0), ("dropout", 1.0), ("rank", True)])
def test_bad_fields_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=name):
        KronLora(**{name: value})


def test_another_adapter_beside_it_sees_the_layer_alone():
    model = nn.Sequential(nn.Linear(16, 16))
    rankwise.adapt(model, KronLora(count=4, rank=2), name="one")
    assert [row["name"] for row in rankwise.adapt(model, Lora(rank=2), name="two").rows] == ["0"]
    rankwise.fold(model)
    assert type(model[0]) is nn.Linear
