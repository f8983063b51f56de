"""Inverses of curvatures made of few gradients, and what dropping weights does to a quadratic loss."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor

from rankwise.linalg import GradientWindow, damage_of_each, grouped, independent, saliency

DAMPING = 1e-3


def window(k: int = 12, d: int = 30, count: int | None = None, seed: int = 0) -> GradientWindow:
    return GradientWindow.of(draw(k, d, seed=seed), damping=DAMPING, count=count)


def successive(rows: Tensor, damping: float, count: int) -> Tensor:
    """A^-1 by Sherman and Morrison's formula, one gradient after the other."""
    inverse = torch.eye(rows.shape[1], dtype=rows.dtype) / damping
    for row in rows:
        image = inverse @ row
        inverse = inverse - torch.outer(image, image) / (count + row @ image)
    return inverse


@pytest.mark.parametrize(("k", "d", "count"), [(12, 30, None), (30, 12, None), (12, 30, 20), (1, 5, None)])
def test_products_and_entries_are_those_of_the_dense_inverse(k: int, d: int, count: int | None):
    found, x = window(k, d, count), draw(d, 1, seed=5)[:, 0]
    rows = draw(k, d)
    dense = rows.mT @ rows / (count or k) + DAMPING * torch.eye(d, dtype=x.dtype)
    torch.testing.assert_close(found.dense(), dense)
    inverse = torch.linalg.inv(dense)
    torch.testing.assert_close(inverse, successive(rows, DAMPING, count or k), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.solve(x), inverse @ x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.diag_inverse(), inverse.diagonal(), rtol=1e-9, atol=1e-9)
    i, j = torch.tensor([0, 1, d - 1, 2]), torch.tensor([1, 1, 0, d - 1])
    torch.testing.assert_close(found.entries(i, j), inverse[i, j], rtol=1e-9, atol=1e-9)
    assert float(found.quadratic(x)) == pytest.approx(float(x @ dense @ x), rel=1e-12)


def test_blocks_are_a_block_diagonal_matrix():
    rows, x = draw(12, 30), draw(30, 1, seed=5)[:, 0]
    blocks = GradientWindow.of(rows.view(12, 5, 6).transpose(0, 1), damping=DAMPING)
    dense = torch.block_diag(*blocks.dense())
    inverse = torch.linalg.inv(dense)
    torch.testing.assert_close(blocks.solve(x.view(5, 6)).flatten(), inverse @ x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(blocks.diag_inverse().flatten(), inverse.diagonal(), rtol=1e-9, atol=1e-9)
    assert float(blocks.quadratic(x.view(5, 6)).sum()) == pytest.approx(float(x @ dense @ x), rel=1e-12)


def test_one_gradient_has_a_closed_form():
    g, x = draw(7, 1)[:, 0], draw(7, 1, seed=1)[:, 0]
    found = GradientWindow.of(g[None], damping=0.3).solve(x)
    torch.testing.assert_close(found, x / 0.3 - (g @ x) * g / (0.3 * (0.3 + g @ g)))


def test_the_order_of_gradients_says_nothing():
    rows, x = draw(12, 30), draw(30, 1, seed=5)[:, 0]
    one, other = (GradientWindow.of(each, damping=DAMPING) for each in (rows, rows[torch.randperm(12)]))
    torch.testing.assert_close(one.solve(x), other.solve(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.diag_inverse(), other.diag_inverse(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("replacements", [1, 4, 5, 13])
def test_replacing_gradients_is_a_new_window(replacements: int):
    k, d = 5, 20
    rows, x = draw(k, d), draw(d, 1, seed=5)[:, 0]
    found = GradientWindow.of(rows.clone(), damping=DAMPING)
    for i, row in enumerate(draw(replacements, d, seed=9)):
        found.replace_row(i % k, row)
        rows[i % k] = row
    wanted = GradientWindow.of(rows, damping=DAMPING)
    assert torch.equal(found.rows, wanted.rows)
    torch.testing.assert_close(found.gram, wanted.gram, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.solve(x), torch.linalg.solve(wanted.dense(), x), rtol=1e-9, atol=1e-9)


def test_with_little_damping_it_is_the_inverse_of_enough_gradients():
    rows, x = draw(40, 8), draw(8, 1, seed=5)[:, 0]
    wanted = 40 * torch.linalg.lstsq(rows, torch.linalg.lstsq(rows.mT, x[:, None]).solution).solution[:, 0]
    found = GradientWindow.of(rows, damping=1e-9).solve(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_half_precision_rows_are_multiplied_in_the_type_of_the_gram_matrix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rankwise.linalg.gradient_window.CHUNK", 50)  # two rows at a time
    rows, x = draw(5, 20).bfloat16(), draw(20, 1, seed=5)[:, 0].float()
    found = GradientWindow(rows.clone(), rows.float() @ rows.float().mT, 0.1, 5)
    wanted = GradientWindow.of(rows.float(), damping=0.1)
    torch.testing.assert_close(found.solve(x), wanted.solve(x))
    torch.testing.assert_close(found.diag_inverse(), wanted.diag_inverse())
    row = draw(20, 1, seed=6)[:, 0].float()
    found.replace_row(3, row)
    torch.testing.assert_close(found.gram, found.rows.float() @ found.rows.float().mT)


class TestDroppingWeights:
    """In the loss 1/2 (v - w)'A(v - w), at its minimum w."""

    def setup_method(self):
        self.curvature, self.weight = window(16, 40), draw(40, 1, seed=3)[:, 0]

    def damage(self, change: Tensor) -> float:
        return float(change @ self.curvature.dense() @ change) / 2

    def mask(self, count: int) -> Tensor:
        dropped = torch.zeros(40, dtype=torch.bool)
        dropped[torch.randperm(40, generator=torch.Generator().manual_seed(count))[:count]] = True
        return dropped

    @pytest.mark.parametrize("update", [grouped, independent])
    def test_the_predicted_damage_of_one_is_the_true_one(self, update):
        predicted = saliency(self.curvature, self.weight)
        for a in range(0, 40, 7):
            dropped = torch.arange(40) == a
            change = update(self.curvature, self.weight, dropped)
            assert change[a] == -self.weight[a]
            assert self.damage(change) == pytest.approx(float(predicted[a]), rel=1e-12)

    @pytest.mark.parametrize("count", [2, 12, 39, 40])
    def test_a_group_is_the_least_squares_solution(self, count: int):
        dropped = self.mask(count)
        inverse = torch.linalg.inv(self.curvature.dense())[:, dropped]
        wanted = -inverse @ torch.linalg.solve(inverse[dropped], self.weight[dropped])
        change = grouped(self.curvature, self.weight, dropped)
        torch.testing.assert_close(change, wanted, rtol=1e-9, atol=1e-9)
        predicted = self.weight[dropped] @ torch.linalg.solve(inverse[dropped], self.weight[dropped]) / 2
        assert self.damage(change) == pytest.approx(float(predicted), rel=1e-10)

    def test_a_group_does_less_damage_than_one_by_one_and_that_less_than_zeros(self):
        dropped = self.mask(12)
        changes = [update(self.curvature, self.weight, dropped) for update in (grouped, independent)]
        damages = [self.damage(change) for change in [*changes, -self.weight * dropped]]
        assert damages == sorted(damages)
        assert damages[0] < 0.9 * damages[1]
        assert damages[1] < 0.9 * damages[2]

    def test_damages_of_nested_groups_are_sums(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("rankwise.linalg.brain_surgeon.CHUNK", 200)  # two blocks at a time
        blocks = GradientWindow.of(draw(16, 50).view(16, 5, 10).transpose(0, 1), damping=DAMPING)
        weight, score = draw(5, 10, seed=3), draw(5, 10, seed=4)
        added = damage_of_each(blocks, weight, score)
        for threshold in (-1.0, 0.0, 0.5, 9.0):
            dropped = score < threshold
            wanted = blocks.quadratic(grouped(blocks, weight, dropped)) / 2
            torch.testing.assert_close((added * dropped).sum(1), wanted, rtol=1e-9, atol=1e-9)
