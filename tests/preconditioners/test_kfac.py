"""Kronecker factors are exact where theory says so, and steps are those of dense systems."""

import pytest
import torch
from preconditioners.test_sngd import models
from torch import Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.core.kronecker_factors import factors
from rankwise.linalg import Jointly, KhatriRao, Separately, both, exact, expanded, reduced
from rankwise.preconditioners import Kfac, Sngd

Seen = dict[str, tuple[Tensor, Tensor]]


def seen(model: nn.Module, x: Tensor, y: Tensor) -> Seen:
    """Inputs (N, T, n), with a one for the bias, and output gradients (N, T, m) of the samples' own losses."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def called(name: str, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        calls.append((name, layer, x.detach(), out))
        return out.clone()  # what follows may write into it

    hooks = [
        layer.register_forward_hook(lambda m, a, out, name=name: called(name, m, a[0], out))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    loss = functional.cross_entropy(model(x), y, reduction="sum")
    gradients = torch.autograd.grad(loss, [out for *_, out in calls])
    for hook in hooks:
        hook.remove()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, layer, a, _), g in zip(calls, gradients, strict=True):
        if isinstance(layer, nn.Conv2d):
            a = functional.unfold(a, layer.kernel_size, stride=layer.stride, padding=layer.padding).mT
            g = g.flatten(2).mT
        elif isinstance(layer, nn.Embedding):
            a = functional.one_hot(a, layer.num_embeddings).to(g.dtype)
        a, g = a.reshape(len(x), -1, a.shape[-1]), g.reshape(len(x), -1, g.shape[-1])
        if getattr(layer, "bias", None) is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        found.setdefault(name, []).append((a, g))
    return {n: (torch.cat([a for a, _ in c], 1), torch.cat([g for _, g in c], 1)) for n, c in found.items()}


def dense_factors(a: Tensor, g: Tensor, reduce: bool) -> tuple[Tensor, Tensor]:
    """A and G in loops over samples and positions that have a gradient."""
    rows = []
    for inputs, gradients in zip(a, g, strict=True):
        real = [t for t in range(len(gradients)) if bool(gradients[t].any())]
        if reduce:
            rows.append((inputs[real].mean(0), gradients[real].sum(0)))
        else:
            rows += [(inputs[t], gradients[t]) for t in real]
    return (
        torch.stack([torch.outer(x, x) for x, _ in rows]).mean(0),
        torch.stack([torch.outer(d, d) for _, d in rows]).sum(0) / len(a),
    )


def matrices(model: nn.Module, gradients: bool) -> dict[str, Tensor]:
    """The weights or their gradients, with the bias as the last column; a table is turned."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(getattr(layer, "weight", None), nn.Parameter):
            continue
        parameters = [p for p in (layer.weight, getattr(layer, "bias", None)) if p is not None]
        parts = [(p.grad if gradients else p.detach()).clone().flatten(1) if p.dim() > 1 else
                 (p.grad if gradients else p.detach()).clone()[:, None] for p in parameters]  # fmt: skip
        found[name] = parts[0].mT if isinstance(layer, nn.Embedding) else torch.cat(parts, 1)
    return found


def step(model: nn.Module, method, x: Tensor, y: Tensor):
    """Take one step; return the handle, the gradients and the natural gradients."""
    handle = rankwise.precondition(model, method, tables=True)
    functional.cross_entropy(model(x), y).backward()
    before = matrices(model, gradients=True)
    handle.step()
    return handle, before, matrices(model, gradients=True)


@pytest.mark.parametrize("sharing", [expanded, reduced])
@pytest.mark.parametrize("name", models())
def test_it_solves_the_dense_system(name: str, sharing):
    model, x = models()[name]
    y, damping = torch.arange(len(x)) % 3, 0.1
    each = seen(model, x, y)
    _, before, after = step(model, Kfac(damping=damping, sharing=sharing), x, y)
    assert before.keys() == each.keys()
    for layer, (a, g) in each.items():
        tokens = isinstance(model.get_submodule(layer), nn.Embedding)
        inputs, outputs = dense_factors(a, g, sharing is reduced and not tokens)
        system = torch.kron(outputs, inputs) + damping * torch.eye(before[layer].numel()).double()
        wanted = torch.linalg.solve(system, before[layer].flatten()).view_as(before[layer])
        assert float((after[layer] - wanted).norm() / wanted.norm()) < 1e-12, layer


def test_large_sides_are_replaced_by_their_diagonals():
    model, x = models()["linear"]
    y, damping = torch.arange(len(x)) % 3, 0.1
    each = seen(model, x, y)
    _, before, after = step(model, Kfac(damping=damping, largest_side=6), x, y)
    for layer, (a, g) in each.items():
        inputs, outputs = (f.diagonal().diag() if len(f) > 6 else f for f in dense_factors(a, g, False))
        system = torch.kron(outputs, inputs) + damping * torch.eye(before[layer].numel()).double()
        wanted = torch.linalg.solve(system, before[layer].flatten()).view_as(before[layer])
        torch.testing.assert_close(after[layer], wanted)


def test_a_table_costs_no_square_of_its_tokens():
    table = nn.Sequential(nn.Embedding(3000, 4), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randint(0, 3000, (5, 3))
    handle, *_ = step(table, Kfac(), x, torch.arange(5) % 3)
    assert sum(t.numel() for t in handle.curvature["0"].values()) < 3 * 3000


def test_one_sample_is_the_exact_fisher_matrix():
    found = []
    for method in (Kfac(damping=0.3), Sngd(damping=0.3)):
        model, x = models()["linear"]
        found.append(step(model, method, x[:1], torch.tensor([2]))[2])
    for layer, natural in found[0].items():
        torch.testing.assert_close(natural, found[1][layer], rtol=1e-11, atol=1e-13)


def test_both_ways_to_share_weights_agree_on_one_position():
    found = []
    for sharing in (expanded, reduced):
        model, x = models()["linear"]
        found.append(step(model, Kfac(sharing=sharing), x, torch.arange(len(x)) % 3)[2])
    for layer, natural in found[0].items():
        torch.testing.assert_close(natural, found[1][layer], rtol=1e-12, atol=0)


@pytest.mark.parametrize("between", [nn.Identity, nn.Tanh])
def test_blocks_of_a_linear_network_are_exact(between: type[nn.Module]):
    """J'J averaged over inputs is E[a a'] kron B'B, where B is what follows; a nonlinearity breaks it.

    The residuals are sqrt(o) e_j for each input, whose second moment is I: independent of the inputs, not only in
    the limit.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), between(), nn.Linear(5, 4), between(), nn.Linear(4, 3)).double()
    inputs = torch.randn(10, 4).double() * torch.tensor([3.0, 1.0, 0.3, 0.1])
    x, residuals = inputs.repeat_interleave(3, 0), 3**0.5 * torch.eye(3).double().repeat(10, 1)
    handle = rankwise.precondition(model, Kfac())
    y = model(x)
    (0.5 * (y - (y.detach() - residuals)).square().sum(1)).mean().backward()
    handle.step()
    for name, curvature in handle.curvature.items():
        layer = model.get_submodule(name)
        block = torch.zeros(sum(p.numel() for p in layer.parameters()), dtype=torch.float64)
        block = torch.outer(block, block)
        for sample in inputs:
            rows = []
            for output in model(sample):
                weight, bias = torch.autograd.grad(output, [layer.weight, layer.bias], retain_graph=True)
                rows.append(torch.cat([weight, bias[:, None]], 1).flatten())
            block += torch.stack(rows).mT @ torch.stack(rows) / len(inputs)
        a, g = factors(curvature, (layer.out_features, layer.in_features + 1))
        error = float((torch.kron(g, a) - block).norm() / block.norm())
        last = name == "4"  # what follows it is linear in any case
        assert error < 1e-13 if between is nn.Identity or last else error > 1e-2, name


@pytest.mark.parametrize(("damping", "invariant"), [(1e-13, True), (0.1, False)])
def test_affine_changes_of_the_inputs_change_nothing_without_damping(damping: float, invariant: bool):
    torch.manual_seed(0)
    x, y = torch.randn(60, 3).double(), torch.randn(60, 3).double()
    change, shift = torch.randn(3, 3).double() + 2 * torch.eye(3).double(), torch.randn(3).double()
    moved = x @ change.mT + shift
    one = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    other = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other[0].weight.copy_(one[0].weight @ change.inverse())
        other[0].bias.copy_(one[0].bias - other[0].weight @ shift)
    torch.testing.assert_close(other(moved), one(x))
    for model, data in ((one, x), (other, moved)):
        handle = rankwise.precondition(model, Kfac(damping=damping))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        (model(data) - y).square().sum(1).mean().backward()
        handle.step()
        optimizer.step()
    with torch.no_grad():
        error = float((other(moved) - one(x)).norm() / one(x).norm())
    assert error < 1e-7 if invariant else error > 1e-4


@pytest.mark.parametrize("identity", [False, True])
def test_running_averages(identity: bool):
    model, x = models()["linear"]
    labels = [(torch.arange(len(x)) + i) % 3 for i in range(3)]
    batches = [dense_factors(*seen(model, x, y)["0"], reduce=False) for y in labels]
    handle = rankwise.precondition(model, Kfac(decay=0.9, identity_start=identity))
    wanted, weight = (torch.eye(6), torch.eye(7)) if identity else (torch.zeros(6, 6), torch.zeros(7, 7)), 0.0
    for y, new in zip(labels, batches, strict=True):
        wanted = [0.9 * old + 0.1 * each for old, each in zip(wanted, new, strict=True)]
        weight = 0.9 * weight + 0.1
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        handle.step()
    for found, each in zip(factors(handle.curvature["0"], (7, 6)), wanted, strict=True):
        torch.testing.assert_close(found, each if identity else each / weight)


@pytest.mark.parametrize("sharing", [expanded, reduced])
def test_samples_of_several_lengths_are_not_mixed_with_what_fills_them_up(sharing):
    """Parts of a batch may have sequences of other lengths; the factors are those of the real positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parts = [torch.randn(2, 5, 3).double(), torch.randn(2, 2, 3).double()]
    inputs, outputs = [], []
    for x in parts:
        for sample in x:
            out = model[0](sample)
            (gradient,) = torch.autograd.grad(model[1:](out).square().mean(), [out])
            a = torch.cat([sample, torch.ones(len(sample), 1).double()], 1)
            inputs += [a.mean(0)] if sharing is reduced else [*a]
            outputs += [gradient.sum(0)] if sharing is reduced else [*gradient]
    handle = rankwise.precondition(model, Kfac(sharing=sharing))
    for x in parts:
        (model(x).square().mean((1, 2)).sum() / 4).backward()
    handle.step()
    a, g = factors(handle.curvature["0"], (4, 4))
    torch.testing.assert_close(a, torch.stack([torch.outer(x, x) for x in inputs]).mean(0))
    torch.testing.assert_close(g, torch.stack([torch.outer(d, d) for d in outputs]).sum(0) / 4)


def test_padding_of_a_table_does_not_count():
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.tensor([[1, 2, 0, 0], [5, 0, 0, 0]])
    handle, *_ = step(table, Kfac(), x, torch.tensor([0, 1]))
    frequencies, _ = factors(handle.curvature["0"], (3, 6))
    torch.testing.assert_close(frequencies, torch.tensor([0, 1, 1, 0, 0, 1]).double() / 3)


@pytest.mark.parametrize("solver", [Jointly(), Separately(), Separately(share=both)])
def test_applying_twice_gives_the_same_and_changes_nothing(solver):
    model, x = models()["linear"]
    method = Kfac(solver=solver)
    handle, before, after = step(model, method, x, torch.arange(len(x)) % 3)
    for layer, curvature in handle.curvature.items():
        kept = {name: tensor.clone() for name, tensor in curvature.items()}
        for _ in range(2):
            assert torch.equal(method.apply([before[layer]], curvature, 0.1)[0], after[layer])
        assert all(torch.equal(kept[name], tensor) for name, tensor in curvature.items())


def test_damping_is_that_of_the_step_also_between_inversions():
    found = []
    for damping in (0.1, lambda step: 0.1 if step == 0 else 7.0):
        model, x = models()["linear"]
        method = Kfac(damping=damping, every=100, factors_every=100)
        handle, before, _ = step(model, method, x, torch.arange(len(x)) % 3)
        model.zero_grad()
        functional.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        handle.step()
        found.append(matrices(model, gradients=True)["0"])
        a, g = factors(handle.curvature["0"], (7, 6))
        system = torch.kron(g, a) + (7.0 if callable(damping) else 0.1) * torch.eye(42).double()
        torch.testing.assert_close(found[-1].flatten(), torch.linalg.solve(system, before["0"].flatten()))
    assert float(found[1].norm()) < float(found[0].norm()) / 2


def test_singular_factors_and_zero_gradients():
    model, x = models()["linear"]
    handle = rankwise.precondition(model, Kfac(damping=1e-6))
    functional.cross_entropy(model(x * 0), torch.zeros(len(x), dtype=torch.long)).backward()
    assert handle.step()
    model.zero_grad(set_to_none=False)
    (model(x).sum() * 0).backward()
    assert handle.step()
    assert all(bool(p.grad.eq(0).all()) for p in model.parameters())


class TestFailures:
    """What cannot be decomposed or is not finite does no harm, and is said."""

    def test_moments_that_overflow_are_not_taken_in(self):
        model = nn.Linear(3, 2)
        handle = rankwise.precondition(model, Kfac(every=1))
        x, signs = torch.ones(4, 3), torch.tensor([[1e25], [-1e25], [1e25], [-1e25]])
        model(x).sum().backward()
        handle.step()
        kept = {name: tensor.clone() for name, tensor in handle.curvature[""].items()}
        model.zero_grad()
        model(x).sum().backward()
        (model(x) * signs).sum().backward()  # huge samples whose sum is not
        with pytest.warns(RuntimeWarning, match="not finite are not taken in"):
            handle.step()
        assert all(torch.equal(kept[name], tensor) for name, tensor in handle.curvature[""].items())

    def test_moments_that_overflow_at_first(self):
        model = nn.Linear(3, 2)
        handle = rankwise.precondition(model, Kfac())
        x, signs = torch.ones(4, 3), torch.tensor([[1e25], [-1e25], [1e25], [-1e25]])
        model(x).sum().backward()
        (model(x) * signs).sum().backward()
        with pytest.raises(ValueError, match="second moments of a layer are not finite"):
            handle.step()

    def test_a_failed_decomposition_keeps_the_previous_loudly(self, monkeypatch):
        model, x = models()["linear"]
        handle, _, first = step(model, Kfac(every=1), x, torch.arange(len(x)) % 3)
        kept = handle.curvature["0"]["inputs.vectors"].clone()

        def fails(matrix: Tensor):
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(torch.linalg, "eigh", fails)
        model.zero_grad()
        functional.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        with pytest.warns(RuntimeWarning, match="The previous one stays in use"):
            handle.step()
        assert torch.equal(handle.curvature["0"]["inputs.vectors"], kept)
        torch.testing.assert_close(matrices(model, gradients=True), first)
        with pytest.raises(ArithmeticError, match="no eigenvectors"):
            step(models()["linear"][0], Kfac(), x, torch.arange(len(x)) % 3)


def test_triangles_are_exchanged():
    each = KhatriRao(torch.randn(9, 1, 40), torch.randn(9, 1, 31), 40)
    rows = type("Rows", (), {"each": each})()
    shared = Kfac().local([rows], {}, torch.Generator(), 8, 0.1)
    assert sum(tensor.numel() for tensor in shared.sums.values()) <= 0.55 * (40**2 + 31**2)
    assert not shared.rows


@pytest.mark.parametrize("early", [0, 3])
def test_inversions_come_more_often_at_the_beginning(early: int):
    model, x = models()["linear"]
    handle = rankwise.precondition(model, Kfac(every=4, early=early))
    changed, before = [], None
    for i in range(9):
        model.zero_grad()
        functional.cross_entropy(model(x), (torch.arange(len(x)) + i) % 3).backward()
        handle.step()
        now = handle.curvature["0"]["outputs.values"]
        if before is None or not torch.equal(now, before):
            changed.append(i)
        before = now.clone()
    assert changed == sorted({*range(early), 0, 4, 8})


def test_the_cost_is_that_of_the_sides_that_are_decomposed():
    assert Kfac().cost([(2, 3), (10, 1)]) == 8 + 27 + 1000 + 1
    assert Kfac(largest_side=5).cost([(2, 100)]) == 8 + 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 3, "factors_every": 2}, "every must be a multiple of factors_every, 2"),
        ({"every": 0}, "every must be"),
        ({"factors_every": 0}, "factors_every must be"),
        ({"early": -1}, "early must be"),
        ({"decay": 1.0}, "decay must be"),
        ({"damping": 0.0}, "damping must be"),
        ({"largest_side": 0}, "largest_side must be"),
    ],
)
def test_wrong_fields(options, words: str):
    with pytest.raises(ValueError, match=words):
        Kfac(**options)


def test_several_positions_have_to_be_shared():
    with pytest.raises(ValueError, match="take sharing=expanded or reduced"):
        Kfac(sharing=exact)


def ill_conditioned(seed: int) -> tuple[Tensor, Tensor]:
    """Labels of a small network, whose inputs are shown turned and up to 300 times shorter."""
    rng = torch.Generator().manual_seed(seed)
    x, hidden, out = (torch.randn(*shape, generator=rng) for shape in ((512, 20), (16, 20), (5, 16)))
    turn = torch.linalg.qr(torch.randn(20, 20, generator=rng))[0]
    return (x * torch.logspace(0, -2.5, 20)) @ turn, (torch.tanh(x @ hidden.mT / 2) @ out.mT).argmax(1)


def steps_until(accuracy: float, seed: int, limit: int, lr: float, momentum: float, method: Kfac | None) -> int:
    """Train; return the first step, of every fifth one, with this accuracy, or the limit."""
    x, y = ill_conditioned(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    handle = None if method is None else rankwise.precondition(model, method)
    for i in range(limit):
        batch = torch.randint(0, len(x), (128,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        if handle is not None:
            handle.step()
        optimizer.step()
        if i % 5 == 0 and float((model(x).argmax(1) == y).float().mean()) >= accuracy:
            return i
    return limit


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_far_fewer_steps_than_tuned_sgd_where_inputs_are_ill_conditioned(seed: int):
    kfac = min(steps_until(0.85, seed, 400, lr, 0.0, Kfac(damping=1e-3, every=5)) for lr in (0.1, 0.3))
    grid = [(lr, momentum) for lr in (0.03, 0.1, 0.3, 1.0) for momentum in (0.0, 0.9)]
    sgd = min(steps_until(0.85, seed, 5 * kfac + 5, lr, momentum, None) for lr, momentum in grid)
    assert 5 * kfac < sgd, f"{kfac} steps against {sgd}"
