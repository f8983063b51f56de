"""A kernel makes a sparse update of two small matrices: special cases, memory, and when it is worth it."""

import itertools

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor

from rankwise.adapters import Lora, Snella
from rankwise.core.methods import Adapter
from rankwise.linalg import distance, hard, inner, magnitude, smallest_kept, soft
from rankwise.matrices import Base, Dense, Kernelled, LowRank, Recomputed, StructuredMatrix, from_spec


def kernelled(**changes) -> Kernelled:
    """A small one with two heads."""
    options = {"kernel": distance, "shrink": hard, "density": 0.3, **changes}
    return Kernelled(draw(2, 12, 3), draw(2, 10, 3, seed=1), (0.4, -0.3), **options)


def attach(method: Adapter, weight: Tensor) -> StructuredMatrix:
    return method.attach(Base(Dense(weight)), {}, Generator().manual_seed(0))


def inside(matrix: StructuredMatrix) -> Kernelled:
    return next(part for part in matrix.modules() if isinstance(part, Kernelled))


def test_inner_products_of_one_head_with_all_entries_left_are_lora():
    left, right = draw(7, 3), draw(3, 5, seed=1)
    matrix = Kernelled(left[None], right.mT[None], [1.0], kernel=inner, shrink=soft, density=1.0)
    other, x = LowRank(left.clone(), right.clone()), draw(4, 5, seed=2)
    torch.testing.assert_close(matrix.dense(), other.dense())
    matrix(x).square().sum().backward()
    other(x).square().sum().backward()
    torch.testing.assert_close(matrix.outputs.grad[0], other.left.grad)
    torch.testing.assert_close(matrix.inputs.grad[0].mT, other.right.grad)


def test_entries_are_those_of_the_formula():
    mixing = torch.tensor([0.7, 1.3, 0.1], dtype=torch.float64)
    matrix = kernelled(mixing=mixing, density=1.0)
    p, q = matrix.outputs.detach(), matrix.inputs.detach()
    expected = torch.empty(12, 10, dtype=torch.float64)
    for i, j in itertools.product(range(12), range(10)):
        expected[i, j] = 0.4 * (p[0, i] - q[0, j]).norm() - 0.3 * (p[1, i] - q[1, j]).norm()
    weights = (expected / 1.3).exp()
    expected = expected + 0.7 * weights / weights.sum(0) + 0.1
    torch.testing.assert_close(matrix.dense(), expected)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
def test_a_share_of_the_entries_is_left_and_they_are_the_largest(density: float):
    matrix = kernelled(density=density)
    full, left = matrix.full().detach(), matrix.dense().detach()
    assert abs(int((left != 0).sum()) - density * 120) <= 1
    smallest = full[left != 0].abs().min()
    assert bool((full[left == 0].abs() <= smallest).all())
    assert torch.equal(left[left != 0], full[left != 0])


@pytest.mark.parametrize("density", [0.001, 0.05, 0.3, 1.0])
def test_soft_thresholds_leave_as_many_entries(density: float):
    matrix, other = kernelled(density=density, shrink=soft), kernelled(density=density)
    assert torch.equal(matrix.dense() != 0, other.dense() != 0)
    full, left = matrix.full().detach(), matrix.dense().detach()
    largest_left_out = full[left == 0].abs().amax() if density < 1 else 0.0
    torch.testing.assert_close(left[left != 0].abs(), full[left != 0].abs() - largest_left_out)


def test_a_single_entry_trains():
    adapted, target = attach(Snella(rank=2, mixed=False), torch.zeros(1, 9)), draw(1, 9, dtype=torch.float32)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (adapted.dense() - target).square().sum().backward()
        optimizer.step()
    assert float(adapted.dense().detach().abs().max()) > 1e-3


def test_ways_to_leave_entries():
    matrix, threshold = torch.tensor([0.5, -1.0, 2.0, -3.0]), torch.tensor(1.0)
    assert hard(matrix, threshold).tolist() == [0, -1, 2, -3]
    assert soft(matrix, threshold).tolist() == [0, 0, 1, -2]
    assert magnitude(matrix, threshold).tolist() == [0, -1, 4, -9]


def test_which_entries_are_left_does_not_depend_on_the_scale():
    one, other = kernelled(), kernelled()
    for points in (other.outputs, other.inputs):
        points.data *= 0.01
    assert torch.equal(one.dense() != 0, other.dense() != 0)


@pytest.mark.parametrize("kernel", [distance, inner])
def test_gradients_of_the_entries_that_are_left_are_exact(kernel):
    matrix = kernelled(kernel=kernel)
    names = [f"matrix.{name}" for name, _ in matrix.named_parameters()]

    def written(*values: Tensor) -> Tensor:
        return torch.func.functional_call(_Writer(matrix), dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(written, tuple(p.detach().requires_grad_() for p in matrix.parameters()))


class _Writer(torch.nn.Module):
    def __init__(self, matrix: StructuredMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self) -> Tensor:
        return self.matrix.dense()


def test_a_distance_of_zero_has_a_finite_gradient():
    """Where the square root of a sum of squares has none."""
    points = draw(3, 4).requires_grad_()
    distance(points, points.detach().clone()).sum().backward()
    assert bool(points.grad.isfinite().all())
    plain = draw(3, 4).requires_grad_()
    (plain[:, None] - plain.detach()).square().sum(-1).sqrt().sum().backward()
    assert not plain.grad.isfinite().all()


def test_a_threshold_of_more_entries_than_quantiles_can_take():
    size = 2**24 + 1
    matrix = torch.arange(size, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(matrix, 0.5)
    assert int(smallest_kept(matrix, 1000)) == size - 1000


@pytest.mark.parametrize("method", [Snella(rank=4), Snella(rank=4, shrink=magnitude)])
def test_gradients_are_those_of_the_stored_matrix(method: Snella):
    matrix = attach(method, draw(9, 7))
    branch = matrix.get_submodule("members.1")
    made = branch.matrix
    assert isinstance(made, Recomputed)
    with torch.no_grad():
        for i, p in enumerate(p for p in made.parameters() if p.requires_grad):
            p += draw(*p.shape, seed=i)
    trained, x = [p for p in made.parameters() if p.requires_grad], draw(5, 7, seed=3).requires_grad_()
    again = torch.autograd.grad(made(x).square().sum(), [x, *trained])
    stored = torch.autograd.grad((x @ made.dense().mT).square().sum(), [x, *trained])
    torch.testing.assert_close(again, stored)


def kept_bytes(m: int, n: int) -> int:
    """What one layer keeps for the backward pass beside its parameters, its input and its weight."""
    adapted = attach(Snella(rank=4), torch.zeros(m, n))
    x, known, seen = torch.randn(2, n).requires_grad_(), 0, {}
    known = {t.data_ptr() for t in (x, *adapted.parameters())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(x).sum()
    return sum(seen.values())


def test_nothing_of_the_size_of_the_weight_is_kept():
    assert kept_bytes(100, 60) == kept_bytes(400, 300) == 0


def test_the_kernel_is_float32_inside_autocast():
    matrix = kernelled(mixing=torch.tensor([1.0, 1.0, 0.0])).float()
    expected = matrix.dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matrix.dense(), expected)


def test_the_first_gradient_reaches_every_point_and_the_first_step_makes_it_sparse():
    adapted = attach(Snella(rank=4, density=0.2), draw(12, 10))
    change = inside(adapted)
    assert not change.dense().any()
    (adapted(draw(6, 10, seed=1)) - draw(6, 12, seed=2)).square().sum().backward()
    assert bool((change.outputs.grad.abs().sum(-1) > 0).all())
    assert bool((change.inputs.grad.abs().sum(-1) > 0).all())
    with torch.no_grad():
        for p in (change.outputs, change.inputs):
            p -= 0.01 * p.grad
    assert 0 < int((change.dense() != 0).sum()) <= 0.2 * 120


def test_magnitudes_could_not_leave_a_start_at_zero():
    """Why they start elsewhere, and what they start with is subtracted."""
    points = draw(1, 6, 2).repeat(2, 1, 1), draw(1, 5, 2, seed=1).repeat(2, 1, 1)
    matrix = Kernelled(*points, (1.0, -1.0), kernel=distance, shrink=magnitude, density=0.5)
    matrix.dense().square().sum().backward()
    assert not matrix.outputs.grad.any()
    adapted = attach(Snella(rank=4, shrink=magnitude), draw(6, 5))
    (adapted(draw(3, 5)) - draw(3, 6, seed=1)).square().sum().backward()
    assert inside(adapted).outputs.grad.any()


def test_density_is_changed_later_and_saved():
    adapted = attach(Snella(rank=4, density=0.5), draw(12, 10))
    change = inside(adapted)
    change.outputs.data += draw(*change.outputs.shape, seed=5)
    before = int((change.dense() != 0).sum())
    change.density = 0.1
    assert int((change.dense() != 0).sum()) <= 12 < before
    again = from_spec(adapted.spec(), dtype=torch.float64)
    again.load_state_dict(adapted.state_dict())
    assert torch.equal(again.dense(), adapted.dense())
    for bad in (0.0, 1.1, True, float("nan")):
        with pytest.raises(ValueError, match="density must be"):
            change.density = bad


def test_few_numbers_of_a_high_rank():
    matrix = Kernelled(draw(2, 64, 2), draw(2, 64, 2, seed=1), (1, -1), kernel=distance, shrink=hard, density=0.1)
    assert int(torch.linalg.matrix_rank(matrix.dense())) > 40  # of 4 numbers a row


def fitted(method: Adapter, target: Tensor) -> float:
    """Squared error after training on the matrix itself, relative to the target."""
    matrix = attach(method, torch.zeros_like(target))
    trained = [p for p in matrix.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (matrix.dense() - target).square().sum() / target.square().sum()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_sparse_teacher_is_for_it_and_a_low_rank_one_for_lora():
    """At equal counts of trained numbers, each method follows its own kind, and not the other's."""
    m, n, rank = 48, 40, 8
    places = torch.randperm(m * n, generator=Generator().manual_seed(0))[: m * n // 50]
    sparse = torch.zeros(m * n)
    sparse[places] = draw(len(places), dtype=torch.float32)
    low = draw(m, rank, dtype=torch.float32) @ draw(rank, n, seed=1, dtype=torch.float32)
    ours, lora = Snella(rank=rank, weight=1.0, mixed=False), Lora(rank=rank)
    assert fitted(ours, sparse.view(m, n)) < 0.75 * fitted(lora, sparse.view(m, n))
    assert fitted(lora, low) < 0.05 < 0.5 < fitted(ours, low)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 3}, "rank must be even"),
        ({"rank": True}, "rank must be even"),
        ({"density": 0.0}, "density must be > 0"),
        ({"weight": 0.0}, "weight must be a positive"),
        ({"scale": -1.0}, "scale must be a positive"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"kernel": soft}, "kernel is one of"),
        ({"shrink": "soft"}, "shrink of"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Snella(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": None}, "positive integer 'heads'"),
        ({"kernel": "other"}, "a kernel of"),
        ({"shrink": ["soft"]}, "a shrink of"),
        ({"weights": [1.0]}, "2 finite numbers"),
        ({"weights": "ab"}, "needs 'weights'"),
        ({"density": None}, "density must be"),
    ],
)
def test_bad_specs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_spec({**kernelled().spec(), **change})
