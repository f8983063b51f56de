"""What is particular to pruning in the metric of the loss."""

import pytest
import torch
from contracts.examples import draw
from contracts.problems import correlated, fill

from rankwise.compressors import KroneckerFactoredPruning
from rankwise.linalg import Splitting, largest


def test_the_search_beats_the_largest_entries_refitted():
    weight, method = draw(40, 30), KroneckerFactoredPruning()
    stats = fill(method.needs, correlated(400, 30, 3), correlated(400, 40, 5))
    choices = method.choices(weight, stats)
    splitting = Splitting(weight, *method.metrics(stats))
    same_work = 2 * method.steps + method.solves
    ratios = []
    for kept, error in zip(choices.costs["macs"].tolist(), choices.errors.tolist(), strict=True):
        magnitude = splitting.error(
            splitting.refit(largest(splitting.target.abs(), kept), splitting.target, same_work)
        )
        ratios.append(error / (method.scale * magnitude))
    assert max(ratios) < 1
    assert ratios[len(ratios) // 2] < 0.7


def test_the_sizes_are_the_shares_bitmap_and_all():
    weight, method = draw(64, 48), KroneckerFactoredPruning()
    stats = fill(method.needs, correlated(400, 48, 3), correlated(400, 64, 5))
    shares = method.choices(weight, stats).costs["params"] / weight.numel()
    torch.testing.assert_close(shares, torch.arange(6, 39) / 40, rtol=0, atol=1e-3)
    one = KroneckerFactoredPruning(share=0.5).choices(weight, stats)
    assert len(one.errors) == 1
    assert abs(float(one.costs["params"][0]) / weight.numel() - 0.5) < 1e-3


def test_large_weights_have_their_errors_predicted():
    weight, method = draw(256, 256, dtype=torch.float32), KroneckerFactoredPruning()
    stats = fill(method.needs, correlated(2000, 256, 3), correlated(2000, 256, 5))
    choices = method.choices(weight, stats)
    for i in range(0, len(choices.errors), 4):
        measured = choices.error_of(weight - choices.build(i).dense().detach())
        assert measured == pytest.approx(float(choices.errors[i]), rel=0.25)


def test_a_large_weight_that_was_pruned_before_has_its_errors_predicted():
    """Those of as many entries as there are, or more, are zero, which says nothing about fewer."""
    weight, method = draw(300, 300, dtype=torch.float32), KroneckerFactoredPruning()
    weight *= weight.abs() >= weight.abs().quantile(0.2)
    stats = fill(method.needs, correlated(2000, 300, 3), correlated(2000, 300, 5))
    choices = method.choices(weight, stats)
    some = choices.errors > 0
    assert 20 < int(some.sum()) < len(some) == len(choices.errors)
    for i in (0, 8, 16, int(some.sum()) - 1, len(some) - 1):
        measured = choices.error_of(weight - choices.build(i).dense().detach())
        assert measured == pytest.approx(float(choices.errors[i]), rel=0.4, abs=1e-9 * choices.total), i


def test_a_weight_stored_transposed_is_pruned_as_any_other():
    weight, method = draw(24, 32), KroneckerFactoredPruning()
    stats = fill(method.needs, correlated(400, 32, 3), correlated(400, 24, 5))
    one, other = (method.choices(each, stats) for each in (weight, weight.mT.contiguous().mT))
    torch.testing.assert_close(one.errors, other.errors)
    torch.testing.assert_close(one.build(3).dense(), other.build(3).dense())
