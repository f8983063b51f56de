"""What every exported method of compression promises, in both gauges."""

import dataclasses
import itertools
import math

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill, tokens, weights
from torch import Tensor, nn

import rankwise
from rankwise import compressors
from rankwise.compressors.truncation import Gauge, TruncatedSvd
from rankwise.core.choices import UNITS
from rankwise.core.errors import CalibrationError
from rankwise.core.finite import is_finite
from rankwise.core.methods import Compressor

KINDS = [getattr(compressors, name) for name in compressors.__all__]
TRUNCATED = [
    kind(gauge=gauge) for kind in KINDS if issubclass(kind, TruncatedSvd) for gauge in ("pivot", "factors")
]
METHODS = [*TRUNCATED, *(kind() for kind in KINDS if not issubclass(kind, TruncatedSvd))]
WEIGHTS = weights()
DATA = list(tokens(1, 1))


def name_of(method: Compressor) -> str:
    return type(method).__name__ + (f"-{method.gauge}" if isinstance(method, TruncatedSvd) else "")


@pytest.fixture(params=METHODS, ids=name_of)
def method(request: pytest.FixtureRequest) -> Compressor:
    return request.param


@pytest.fixture(params=TRUNCATED, ids=name_of)
def truncated(request: pytest.FixtureRequest) -> TruncatedSvd:
    return request.param


def some(count: int) -> list[int]:
    """At most about ten places, the first and the last among them; there may be none for a tiny layer."""
    return sorted({*range(0, count, max(count // 8, 1)), *range(count)[-1:]})


def offer(method: Compressor, weight: Tensor, data: str = "many"):
    return method.choices(weight, fill(method.needs, *tokens(*weight.shape)[data]))


@pytest.mark.parametrize("shape", ["square", "tall", "wide"])
def test_something_better_than_zero_is_offered(method: Compressor, shape: str):
    choices = offer(method, WEIGHTS[shape])
    assert len(choices.errors) > 0
    assert float(choices.errors.min()) < choices.total


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("shape", WEIGHTS)
def test_errors_are_the_measured_ones(method: Compressor, shape: str, data: str):
    weight = WEIGHTS[shape]
    if not method.needs and data != "many":
        pytest.skip("needs no statistics")
    if data == "dead input feature" and weight.shape[1] == 1:
        pytest.skip("without a living feature the statistics are zero")
    choices = offer(method, weight, data)
    small = 1e-9 * choices.total + 1e-25
    assert choices.total == pytest.approx(choices.error_of(weight), rel=1e-9, abs=small)
    for i in some(len(choices.errors)):
        change = weight - choices.build(i).dense().detach()
        assert choices.error_of(change) == pytest.approx(float(choices.errors[i]), rel=1e-6, abs=small)


@pytest.mark.parametrize("shape", WEIGHTS)
def test_every_rank_is_offered_and_the_last_is_exact(truncated: TruncatedSvd, shape: str):
    weight = WEIGHTS[shape]
    choices = offer(truncated, weight)
    errors = choices.errors.tolist()
    assert [choices.build(i).rank for i in range(len(errors))] == list(range(1, min(weight.shape) + 1))
    assert all(low >= high for low, high in itertools.pairwise(errors))
    assert choices.total >= errors[0]
    assert errors[-1] == 0
    largest = choices.build(len(errors) - 1).dense().detach()
    torch.testing.assert_close(largest, weight, rtol=0, atol=1e-7 * float(weight.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["square", "tall", "wide", "rank one"])
def test_costs_are_what_is_stored(method: Compressor, shape: str, dtype: torch.dtype):
    choices = offer(method, WEIGHTS[shape].to(dtype))
    assert set(choices.costs) == set(UNITS)
    for i in some(len(choices.errors)):
        matrix = choices.build(i)
        stored = {"params": matrix.params, "bytes": matrix.nbytes, "macs": matrix.macs}
        assert {unit: int(cost[i]) for unit, cost in choices.costs.items()} == stored
        assert all(t.dtype == dtype for t in matrix.state_dict().values() if t.is_floating_point())
        assert matrix.shape == WEIGHTS[shape].shape


def test_float32_is_as_good_as_its_digits(method: Compressor):
    weight = WEIGHTS["square"].float()
    choices = offer(method, weight)
    for i in some(len(choices.errors)):
        change = weight - choices.build(i).dense().detach()
        assert choices.error_of(change) == pytest.approx(
            float(choices.errors[i]), rel=1e-4, abs=1e-8 * choices.total
        )


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 50])
@pytest.mark.parametrize("repeats", [1, 20])
def test_fewer_tokens_than_features(method: Compressor, rows: int, repeats: int):
    weight = draw(80, 64)
    x, grad = (correlated(rows, size, size).repeat(repeats, 1) for size in (64, 80))
    choices = method.choices(weight, fill(method.needs, x, grad))
    for i in some(len(choices.errors)):
        change = weight - choices.build(i).dense().detach()
        assert choices.error_of(change) == pytest.approx(
            float(choices.errors[i]), rel=1e-5, abs=1e-7 * choices.total
        )


@pytest.mark.parametrize("multiple", [4, 17, 100])
def test_ranks_are_multiples(truncated: TruncatedSvd, multiple: int):
    weight = WEIGHTS["square"]
    every, few = offer(truncated, weight), offer(dataclasses.replace(truncated, rank_multiple=multiple), weight)
    step = min(multiple, min(weight.shape))  # a small layer offers its full rank alone
    ranks = list(range(step, min(weight.shape) + 1, step))
    assert [few.build(i).rank for i in range(len(few.errors))] == ranks
    index = torch.tensor(ranks) - 1
    assert torch.equal(few.errors, every.errors[index])
    assert all(torch.equal(few.costs[unit], every.costs[unit][index]) for unit in UNITS)


def test_same_input_same_bits(method: Compressor):
    one, two = (offer(method, WEIGHTS["tall"]) for _ in range(2))
    assert torch.equal(one.errors, two.errors)
    states = [choices.build(len(one.errors) // 2).state_dict() for choices in (one, two)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_a_mean_comes_from_methods_that_say_so(method: Compressor):
    assert (offer(method, WEIGHTS["tall"]).mean is not None) == method.shifts


def test_another_weight_is_fitted_with_the_same_sizes(method: Compressor):
    offers = offer(method, WEIGHTS["tall"])
    other, x, grad = draw(17, 6), correlated(40, 6, 7), correlated(40, 17, 8)
    stats = fill(method.needs, x, grad)
    alone = method.choices(other, stats)
    for i in some(len(offers.errors)):
        ours, theirs = (m.state_dict() for m in (offers.refit(i, other, stats), alone.build(i)))
        assert list(ours) == list(theirs)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_weight_that_is_stored_transposed_is_the_same_weight(method: Compressor):
    turned = WEIGHTS["tall"].mT.contiguous().mT
    one, two = (offer(method, weight) for weight in (WEIGHTS["tall"], turned))
    torch.testing.assert_close(one.errors, two.errors)
    for i in some(len(one.errors)):
        torch.testing.assert_close(one.build(i).dense(), two.build(i).dense())


def test_the_weight_is_left_alone(method: Compressor):
    weight = WEIGHTS["tall"].clone()
    choices = offer(method, weight)
    with torch.no_grad():
        for tensor in choices.build(len(choices.errors) - 1).parameters():
            tensor.fill_(torch.nan)
    assert torch.equal(weight, WEIGHTS["tall"])
    assert bool(choices.build(len(choices.errors) - 1).dense().isfinite().all())


def test_statistics_without_rows_are_refused(method: Compressor):
    if not method.needs:
        pytest.skip("needs no statistics")
    with pytest.raises(CalibrationError):
        method.choices(WEIGHTS["tall"], {kind: kind(17, 6) for kind in method.needs})


def test_statistics_that_are_zero_are_refused_or_do_no_harm(method: Compressor):
    weight = WEIGHTS["tall"]
    zero = fill(method.needs, torch.zeros(20, 6), torch.zeros(20, 17))
    try:
        choices = method.choices(weight, zero)
    except ValueError as error:
        assert "zero" in str(error)  # noqa: PT017 (either outcome is right)
        return
    torch.testing.assert_close(choices.build(5).dense().detach(), weight)


def test_a_wrong_field_is_refused(method: Compressor):
    fields = dataclasses.fields(method)
    wrong = {
        float: (-1.0, math.nan, math.inf),
        int: (0, -1),
        int | None: (0, 9),
        float | None: (0.0, 1.0, math.nan),
        bool: (),
        Gauge: ("triangular",),
    }
    for field in fields:
        for value in wrong.get(field.type, ((),)):  # pyright: ignore[reportArgumentType]
            with pytest.raises(ValueError, match=field.name):
                dataclasses.replace(method, **{field.name: value})


def test_a_method_is_a_frozen_value(method: Compressor):
    assert method == dataclasses.replace(method)
    assert hash(method) == hash(dataclasses.replace(method))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.gauge = "factors"  # pyright: ignore[reportAttributeAccessIssue]


def test_numbers_that_a_type_cannot_hold_are_refused(method: Compressor):
    """Inputs that are nearly alike, so that leaving one out doubles the weight of another."""
    torch.manual_seed(0)
    x = (torch.randn(256, 32).repeat_interleave(2, 1) + 0.01 * torch.randn(256, 64)).half() / 1000
    model, refused = nn.Sequential(nn.Linear(64, 64, bias=False)).half(), None
    nn.init.constant_(model[0].weight, 60_000.0)
    try:
        rankwise.compress(model, method, keep=0.6, of="bytes", data=[x])
    except ValueError as error:
        refused = str(error)
    assert refused is None or "numbers that torch.float16 cannot hold" in refused
    assert all(is_finite(tensor) for tensor in model.state_dict().values())
    assert is_finite(model(x))
