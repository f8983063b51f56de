"""Rounding to few values, with and without feedback."""

import itertools

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated
from torch import Tensor

from rankwise.linalg import Metric, metric_norm, round_to_grid


def gram(n: int, seed: int = 0) -> Tensor:
    rows = correlated(300, n, seed)
    return rows.mT @ rows / len(rows)


def loss(weight: Tensor, values: Tensor, inputs: Metric) -> float:
    return metric_norm(weight - values, Metric(), inputs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 5, 12, 40])
def test_codes_are_on_the_grid_and_values_between_its_ends(bits: int, group: int):
    weight = draw(7, 12)
    rounded = round_to_grid(weight, Metric(gram(12), 1e-6), bits=bits, group=group, dtype=torch.float64)
    assert rounded.codes.dtype == torch.uint8
    assert int(rounded.codes.max()) < 2**bits
    assert rounded.scale.shape == rounded.offset.shape == (7, -(-12 // group))
    offset, scale = rounded.offset, rounded.scale
    codes = rounded.codes.double()
    columns = [torch.addcmul(offset[:, j // group], scale[:, j // group], codes[:, j]) for j in range(12)]
    assert torch.equal(rounded.dense(), torch.stack(columns, 1))


def test_without_feedback_every_number_goes_to_the_nearest_value():
    weight = draw(6, 16)
    rounded = round_to_grid(weight, Metric(gram(16), 1e-6), bits=3, group=4, dtype=torch.float64, feedback=False)
    scale, offset = (t.repeat_interleave(4, 1)[..., None] for t in (rounded.scale, rounded.offset))
    values = scale * torch.arange(8) + offset
    nearest = (weight[..., None] - values).abs().amin(-1)
    torch.testing.assert_close((weight - rounded.dense()).abs(), nearest, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "metric", [Metric(), Metric(draw(16, 1).square().squeeze() + 0.1)], ids=["I", "diagonal"]
)
def test_feedback_has_nothing_to_do_where_columns_do_not_interact(metric: Metric):
    weight = draw(6, 16)
    one, two = (
        round_to_grid(weight, metric, bits=3, group=4, dtype=torch.float64, feedback=feedback)
        for feedback in (True, False)
    )
    assert torch.equal(one.codes, two.codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_helps(bits: int):
    weight, inputs = draw(40, 48), Metric(gram(48), 1e-6)
    with_it, without = (
        loss(
            weight,
            round_to_grid(weight, inputs, bits=bits, group=16, dtype=torch.float64, feedback=feedback).dense(),
            inputs,
        )
        for feedback in (True, False)
    )
    assert with_it < 0.5 * without


def test_feedback_is_the_least_squares_answer_of_the_columns_to_come():
    """Two columns: after the first is rounded, the second aims at what minimises the error in C."""
    weight, moment = draw(5, 2), torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    rounded = round_to_grid(weight, Metric(moment), bits=8, group=1, dtype=torch.float64)
    first = weight[:, 0] - rounded.dense()[:, 0]
    assert bool((first.abs() < 1e-12).all())  # a group of one number has its own scale and offset
    rounded = round_to_grid(weight, Metric(moment), bits=1, group=2, dtype=torch.float64)
    values = rounded.dense()
    error = weight[:, 0] - values[:, 0]
    target = weight[:, 1] + error * moment[0, 1] / moment[1, 1]
    scale, offset = rounded.scale[:, 0], rounded.offset[:, 0]
    best = torch.where((target - offset - scale).abs() < (target - offset).abs(), offset + scale, offset)
    torch.testing.assert_close(values[:, 1], best)


def test_between_the_best_of_all_codes_and_the_nearest_ones():
    weight, inputs = draw(30, 4), Metric(gram(4), 0.1)
    kinds = {
        feedback: round_to_grid(weight, inputs, bits=2, group=4, dtype=torch.float64, feedback=feedback)
        for feedback in (True, False)
    }
    best = 0.0
    for row, scale, offset in zip(weight, kinds[True].scale, kinds[True].offset, strict=True):
        options = torch.tensor(list(itertools.product(range(4), repeat=4))) * scale + offset
        best += min(loss(row[None], option[None], inputs) for option in options)
    found, nearest = (loss(weight, kinds[feedback].dense(), inputs) for feedback in (True, False))
    assert best <= found < nearest


def test_exact_where_the_weight_is_on_a_grid():
    codes = torch.arange(64).view(4, 16) % 16
    weight = codes * 0.25 - 1.0
    rounded = round_to_grid(weight.double(), Metric(gram(16), 1e-6), bits=4, group=16, dtype=torch.bfloat16)
    torch.testing.assert_close(rounded.dense().double(), weight.double(), rtol=0, atol=1e-12)


def test_steps_are_the_least_that_half_precision_holds_where_a_range_asks_for_less():
    weight = 1e-6 * draw(7, 64)
    rounded = round_to_grid(weight, Metric(), bits=8, group=64, dtype=torch.float16, feedback=False)
    least = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    values = rounded.scale.double() * rounded.codes + rounded.offset.double()
    assert bool((rounded.scale.double() == least).all())
    assert bool(((weight - values).abs() <= 1.01 * least).all())
