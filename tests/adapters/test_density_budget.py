"""SNELLA's allocation: exact shares, the scores of the formula, and entries where they are needed."""

from pathlib import Path

import pytest
import torch
from contracts.examples import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankwise
from rankwise.adapters import Snella
from rankwise.core.adapted import adapted
from rankwise.core.methods import Course
from rankwise.core.sharing import shared
from rankwise.linalg import distance, soft
from rankwise.matrices import Dense, Kernelled, Recomputed, Scheduled
from rankwise.schedules import DensityBudget

SIZES = 60, 30
STEPS = 40


@given(
    parts=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**7)), min_size=1, max_size=12),
    share=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_shares_add_up_and_fit(parts: list[tuple[float, int]], share: float):
    weights, most = map(list, zip(*parts, strict=True))
    total = len(most) + int(share * (sum(most) - len(most)))
    counts = shared(total, weights, most)
    assert sum(counts) == total
    assert all(1 <= count <= limit for count, limit in zip(counts, most, strict=True))
    for one, (weight, limit) in zip(
        counts, parts, strict=True
    ):  # no less for a larger weight, where there is room
        others = [c for c, (w, m) in zip(counts, parts, strict=True) if w < weight and m <= limit]
        assert all(one >= min(other, limit) - 1 for other in others)


def test_shares_are_proportional_where_all_fit():
    weights = [3.0, 1.0, 4.0, 2.0]
    counts = shared(10_004, weights, [10_000] * 4)
    assert counts == [3001, 1001, 4001, 2001]
    assert shared(10, [0.0, 0.0], [5, 25]) == [2, 8]
    assert shared(1000, [1.0, 1.0], [5, 25]) == [5, 25]
    assert shared(0, [1.0, 1.0], [5, 25]) == [1, 1]


def kernel(m: int, n: int, seed: int, density: float = 0.9) -> Recomputed:
    points = draw(2, m, 3, seed=seed), draw(2, n, 3, seed=seed + 1)
    return Recomputed(Kernelled(*points, (1.0, -1.0), kernel=distance, shrink=soft, density=density))


def kept(course: Course) -> list[int]:
    return [
        part.kept for matrix in course.matrices.values() for part in matrix.modules() if hasattr(part, "kept")
    ]


def course_of(schedule: DensityBudget) -> Course:
    matrices = {"a": kernel(10, 6, 1), "b": kernel(6, 5, 5)}
    parameters = [p for matrix in matrices.values() for p in matrix.parameters()]
    course = Course(schedule, matrices, torch.optim.SGD(parameters, lr=0.1), STEPS)
    schedule.settle(course)
    return course


def test_scores_and_counts_are_those_of_the_formula():
    schedule = DensityBudget(target=0.3, sensitivity=0.7, uncertainty=0.6)
    course = course_of(schedule)
    means = {
        p: (torch.zeros_like(p), torch.zeros_like(p)) for m in course.matrices.values() for p in m.parameters()
    }
    first, before = sum(kept(course)), 10**9
    for step in range(STEPS):
        for i, p in enumerate(means):
            p.grad = draw(*p.shape, seed=100 * step + i)
            now = (p * p.grad).abs().detach()
            mean = 0.7 * means[p][0] + 0.3 * now
            means[p] = mean, 0.6 * means[p][1] + 0.4 * (now - mean).abs()
        course.done = step
        schedule.before(course)
        course.done = step + 1
        schedule.after(course)
        schedule.settle(course)
        scores = [
            float(sum((means[p][0] * means[p][1]).mean() for p in m.parameters()))
            for m in course.matrices.values()
        ]
        last = round(0.3 * sum(SIZES))
        total = last + int((first - last) * (1 - (step + 1) / STEPS) ** 3)
        assert sum(kept(course)) == total <= before
        before = total
        share = scores[0] / sum(scores)  # of what is beyond one each; a full layer leaves the rest to the other
        wanted = 1 + min(max((total - 2) * share, total - 2 - (SIZES[1] - 1)), SIZES[0] - 1)
        assert kept(course)[0] == pytest.approx(wanted, abs=1)


def test_nothing_is_chosen_before_and_after_its_time():
    schedule = DensityBudget(target=0.3, warmup=0.25, tail=0.25, every=4)
    course, counts = course_of(schedule), []
    for step in range(STEPS):
        for i, p in enumerate(p for m in course.matrices.values() for p in m.parameters()):
            p.grad = draw(*p.shape, seed=100 * step + i)
        course.done = step
        schedule.before(course)
        course.done = step + 1
        schedule.after(course)
        schedule.settle(course)
        counts.append(tuple(kept(course)))
    assert set(counts[:11]) == {(54, 27)}
    changes = [step for step in range(1, STEPS) if counts[step] != counts[step - 1]]
    assert changes == [11, 15, 19, 23, 27, 29]  # after steps 12, 16, ..., and 30, when the tail begins
    assert sum(counts[-1]) == round(0.3 * sum(SIZES))


def beside() -> nn.ModuleList:
    """Two layers of the same inputs."""
    torch.manual_seed(1)
    return nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)]).double()


def counts_of(model: nn.Module) -> list[int]:
    return [p.kept for layer in adapted(model).values() for p in layer.modules() if isinstance(p, Kernelled)]


@pytest.mark.parametrize("where", [0, 1])
def test_entries_go_to_the_layer_that_has_to_change_most(where: int, tmp_path: Path):
    model, goals, x = beside(), beside(), draw(128, 16, seed=1)
    with torch.no_grad():
        for i, layer in enumerate(goals):
            layer.weight[:4] += (1.0 if i == where else 0.2) * draw(4, 16, seed=2 + i)
    rankwise.adapt(model, Snella(rank=8, mixed=False, weight=1.0, density=0.9, target=0.2, tail=0.5))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    follower = rankwise.follow(model, optimizer, steps=100)
    for _ in range(100):
        optimizer.zero_grad()
        sum((one(x) - goal(x)).square().mean() for one, goal in zip(model, goals, strict=True)).backward()
        optimizer.step()
    counts = counts_of(model)
    assert sum(counts) == round(0.2 * 512)
    assert counts[where] > 5 * counts[1 - where]

    outputs = [layer(x).detach() for layer in model.eval()]
    follower.finish()
    assert not any(isinstance(part, Scheduled) for part in model.modules())
    rankwise.save(model, tmp_path / "adapter", format="rankwise")
    again = beside()
    rankwise.load_adapter(again, tmp_path / "adapter")
    assert counts_of(again) == counts
    assert all(torch.equal(layer(x), output) for layer, output in zip(again, outputs, strict=True))


def test_gradients_that_are_not_finite_are_an_error():
    course = course_of(DensityBudget())
    for p in course.matrices["b"].parameters():
        p.grad = torch.full_like(p, float("nan"))
    course.schedule.before(course)
    course.done = 1
    with pytest.raises(ValueError, match="layer b: gradients were not finite"):
        course.schedule.after(course)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": 0.0}, "target must be > 0"),
        ({"target": 0.5}, "target must be <= density 0.1"),
        ({"target": 0.05, "every": 0}, "every must be an integer"),
        ({"target": 0.05, "warmup": 0.6, "tail": 0.4}, "leave no steps"),
    ],
)
def test_bad_fields(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Snella(**fields)


def test_other_matrices_are_refused():
    for matrix in (Dense(draw(3, 3)), Recomputed(Dense(draw(3, 3))), kernel(3, 3, 1).matrix):
        with pytest.raises(ValueError, match="acts on a Recomputed"):
            DensityBudget().check(matrix)
