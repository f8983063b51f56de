"""AdaLoRA: its scores, its budget, and the layers that it finds."""

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

import rankwise
from rankwise.adapters import AdaLora
from rankwise.core.adapted import adapted
from rankwise.core.methods import Course
from rankwise.matrices import Dense, Diagonal, Product
from rankwise.schedules import TripletBudget

STEPS = 60


def net(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 8)).double()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def triplets(seed: int, rank: int = 4) -> Product:
    return Product(
        Dense(draw(9, rank, seed=seed)), Diagonal(draw(rank, seed=seed + 1)), Dense(draw(rank, 7, seed=5))
    )


def course_of(*matrices: Product, steps: int = STEPS) -> Course:
    """A course whose parameters all have gradients."""
    parameters = [p for matrix in matrices for p in matrix.parameters()]
    for i, p in enumerate(parameters):
        p.grad = draw(*p.shape, seed=50 + i)
    named = {str(i): m for i, m in enumerate(matrices)}
    return Course(TripletBudget(), named, torch.optim.SGD(parameters, lr=0.1), steps)


def values(matrix: Product) -> Tensor:
    return matrix.parts[1].get_parameter("values").detach()


def test_the_regulariser_is_the_gradient_of_both_distances():
    course = course_of(triplets(1), triplets(7))
    before = [p.grad.clone() for m in course.matrices.values() for p in m.parameters()]
    TripletBudget(target=2, orthogonality=0.3).before(course)
    distances = []
    for matrix in course.matrices.values():
        left, _, right = matrix.parameters()
        distances += [(v @ v.mT - torch.eye(4, dtype=torch.float64)).norm() for v in (left.mT, right)]
    parameters = [p for m in course.matrices.values() for p in m.parameters()]
    wanted = torch.autograd.grad(
        0.3 * torch.stack(distances).mean(), parameters, allow_unused=True, materialize_grads=True
    )
    for p, old, new in zip(parameters, before, wanted, strict=True):
        torch.testing.assert_close(p.grad, old + new)


def test_orthonormal_vectors_are_left_alone():
    left, right = torch.linalg.qr(draw(9, 4)).Q, torch.linalg.qr(draw(7, 4)).Q.mT
    course = course_of(Product(Dense(left), Diagonal(draw(4)), Dense(right)))
    course.optimizer.zero_grad()
    TripletBudget(target=2).before(course)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in course.matrices["0"].parameters())


def test_scores_are_those_of_the_paper():
    schedule = TripletBudget(target=1, warmup=0.0, every=1, sensitivity=0.7, uncertainty=0.6, orthogonality=0.0)
    course = course_of(triplets(1), triplets(7))
    means = {
        p: (torch.zeros_like(p), torch.zeros_like(p)) for m in course.matrices.values() for p in m.parameters()
    }
    for step in range(3):
        for p in means:
            p.grad = draw(*p.shape, seed=90 + step)
            now = (p * p.grad).abs().detach()
            mean = 0.7 * means[p][0] + 0.3 * now
            means[p] = mean, 0.6 * means[p][1] + 0.4 * (now - mean).abs()
        course.done = step
        schedule.before(course)
    scores = []
    for matrix in course.matrices.values():
        left, value, right = (means[p][0] * means[p][1] for p in matrix.parameters())
        scores.append(value + left.mean(0) + right.mean(1))
    course.done = 3
    schedule.after(course)
    count = schedule.budget(3, STEPS, 8, 2)
    least = torch.cat(scores).sort(descending=True).values[count - 1]
    for matrix, score in zip(course.matrices.values(), scores, strict=True):
        assert torch.equal(values(matrix) != 0, score >= least)


def test_the_order_of_triplets_changes_nothing():
    order = torch.tensor([2, 0, 3, 1])
    plain, turned = (course_of(triplets(1)) for _ in range(2))
    left, value, right = turned.matrices["0"].parameters()
    with torch.no_grad():
        for p, axis in ((left, 1), (value, 0), (right, 0)):
            p.copy_(p.index_select(axis, order))
            p.grad = p.grad.index_select(axis, order)
    for course in (plain, turned):
        schedule = TripletBudget(target=2, tail=0.9, warmup=0.0)
        schedule.before(course)
        course.done = schedule.last(STEPS)
        schedule.after(course)
    one, two = plain.matrices["0"], turned.matrices["0"]
    assert torch.equal(values(one)[order] != 0, values(two) != 0)
    assert int((values(one) != 0).sum()) == 2


@pytest.mark.parametrize(("warmup", "tail"), [(0.1, 0.5), (0.0, 0.0), (0.9, 0.0), (0.0, 0.99), (0.5, 0.49)])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_the_budget_falls_from_first_to_last(warmup: float, tail: float, steps: int):
    schedule = TripletBudget(target=2, warmup=warmup, tail=tail)
    budgets = [schedule.budget(i, steps, 24, 8) for i in range(steps + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == 8
    if steps == 1000:
        assert budgets[round(1000 * warmup)] == 24
        assert budgets[1000 - round(1000 * tail)] == 8
        middle = (round(1000 * warmup) + schedule.last(1000)) // 2
        assert budgets[middle] == pytest.approx(8 + 16 / 8, abs=1)


def train(model: nn.Module, method: AdaLora, steps: int = STEPS, lr: float = 0.05, counts: list | None = None):
    rankwise.adapt(model, method)
    optimizer = torch.optim.Adam(trained(model), lr=lr)
    follower = rankwise.follow(model, optimizer, steps=steps)
    x, y = draw(64, 10, seed=1), draw(64, 8, seed=2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if counts is not None:
            diagonals = [p for m in model.modules() if isinstance(m, Diagonal) for p in m.parameters()]
            counts.append(int(sum((d != 0).sum() for d in diagonals)))
    return follower


def test_as_many_values_are_left_as_the_budget_says():
    counts: list[int] = []
    method = AdaLora(rank=6, target=2, warmup=0.1, tail=0.3, every=4)
    model = net()
    follower = train(model, method, counts=counts)
    for done, count in enumerate(counts, 1):
        if done > 42 or (done % 4 == 0 and done > 6):  # before, values move again between two choices
            assert count == method.schedule.budget(done, STEPS, 12, 4), done
    x, before = draw(5, 10, seed=3), [m for m in model.modules() if isinstance(m, Diagonal)]
    output = model.eval()(x).detach()
    report = follower.finish()
    assert report.totals["rank"] == sum(row["rank"] for row in report.rows) == 4
    assert [row["before"] for row in report.rows] == [6, 6]
    sizes = [m.shape[0] for m in model.modules() if isinstance(m, Diagonal)]
    assert sum(sizes) == 4 < sum(m.shape[0] for m in before)
    torch.testing.assert_close(model(x), output)


def test_a_budget_that_does_not_fall_changes_nothing():
    model, plain = net(), net()
    train(model, AdaLora(rank=4, target=4, orthogonality=0.0))
    rankwise.adapt(plain, AdaLora(rank=4, target=4, orthogonality=0.0))
    for layer in adapted(plain).values():
        for part in layer.modules():
            part.followed = True  # nothing acts
    optimizer = torch.optim.Adam(trained(plain), lr=0.05)
    x, y = draw(64, 10, seed=1), draw(64, 8, seed=2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (plain(x) - y).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_vectors_become_orthonormal():
    def distance(model: nn.Module) -> float:
        found = [m for m in model.modules() if isinstance(m, Dense) and m.weight.requires_grad]
        rows = [m.weight.detach() if m.shape[0] == 4 else m.weight.detach().mT for m in found]
        return float(sum((v @ v.mT - torch.eye(4, dtype=v.dtype)).norm() for v in rows))

    drawn, without = net(), net()
    train(drawn, AdaLora(rank=4, target=4, orthogonality=1.0), steps=150)
    train(without, AdaLora(rank=4, target=4, orthogonality=0.0), steps=150)
    assert distance(drawn) < 0.5 * min(distance(without), 4 * 2)  # |I| = 2 where vectors are nearly zero


def test_ranks_go_where_the_update_is():
    """A teacher differs from the start by rank 6 in the first layer and not at all in the second."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 16, bias=False), nn.Linear(16, 16, bias=False)).double()
    x = draw(256, 20, seed=1)
    with torch.no_grad():
        update = torch.linalg.qr(draw(16, 6, seed=2)).Q @ torch.linalg.qr(draw(20, 6, seed=3)).Q.mT
        y = (x @ (model[0].weight + update).mT, x @ (model[0].weight + update).mT @ model[1].weight.mT)
    rankwise.adapt(model, AdaLora(rank=8, target=3, every=5, tail=0.3))
    optimizer = torch.optim.Adam(trained(model), lr=0.02)
    follower = rankwise.follow(model, optimizer, steps=400)
    for _ in range(400):
        optimizer.zero_grad()
        hidden = model[0](x)
        loss = (hidden - y[0]).square().mean() + (model[1](hidden) - y[1]).square().mean()
        loss.backward()
        optimizer.step()
    follower.finish()
    ranks = {name: 0 if name not in adapted(model) else _rank(adapted(model)[name]) for name in ("0", "1")}
    assert ranks["0"] >= 5
    assert ranks["1"] <= 1


def _rank(layer: nn.Module) -> int:
    return sum(m.shape[0] for m in layer.modules() if isinstance(m, Diagonal))


def test_a_layer_may_end_without_triplets():
    model = net()
    follower = train(model, AdaLora(rank=4, target=1))
    diagonals = [m for m in model[0].modules() if isinstance(m, Diagonal)]
    with torch.no_grad():
        diagonals[0].values.zero_()
    x = draw(3, 10, seed=4)
    before = model.eval()(x).detach()
    follower.finish()
    assert type(model[0]) is nn.Linear
    assert "2" in adapted(model)
    torch.testing.assert_close(model(x), before)


def test_gradients_that_are_not_finite_are_an_error():
    model = net()
    rankwise.adapt(model, AdaLora(rank=2, target=1, warmup=0.0, every=1))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    rankwise.follow(model, optimizer, steps=4)
    (model(draw(3, 10)) * float("nan")).sum().backward()
    with pytest.raises(ValueError, match="not finite"):
        optimizer.step()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 4, "target": 5}, "target must be <= rank"),
        ({"target": 0}, "target must be an integer"),
        ({"every": 0}, "every must be an integer"),
        ({"warmup": 0.6, "tail": 0.4}, "leave no steps"),
        ({"sensitivity": 1.0}, "sensitivity must be"),
        ({"orthogonality": -1.0}, "orthogonality must be"),
    ],
)
def test_bad_fields(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AdaLora(**fields)
