"""The moments are the diagonal of the true Fisher matrix in the eigenbasis: the best diagonal there is."""

import pytest
import torch
from preconditioners.test_kfac import matrices, step
from preconditioners.test_sngd import models, of_each_sample
from torch import Tensor, nn
from torch.nn import functional

import rankwise
from rankwise.core import conditioning
from rankwise.core.kronecker_factors import averaged, factors
from rankwise.linalg import KhatriRao, KroneckerBasis, expanded
from rankwise.preconditioners import Ekfac, Sngd


def two_steps(name: str, **fields):
    """Look twice at the same batch, the second time in the basis of the first."""
    model, x = models()[name]
    y = torch.arange(len(x)) % 3
    each = of_each_sample(model, x, y)
    handle, before, _ = step(model, Ekfac(early=0, **fields), x, y)
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    handle.step()
    return handle, each, before, matrices(model, gradients=True)


def dense_fisher(model: nn.Module, layer: str, each: dict[str, Tensor]) -> Tensor:
    """The block of a layer, seen as matrices (m, n) with the bias last."""
    weight = each[f"{layer}.weight"]
    tokens = isinstance(model.get_submodule(layer), nn.Embedding)
    parts = [weight.mT if tokens else weight.flatten(2)]
    if f"{layer}.bias" in each:
        parts.append(each[f"{layer}.bias"][..., None])
    rows = torch.cat(parts, 2).flatten(1)
    return rows.mT @ rows / len(rows)


def dense_basis(curvature: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    basis = KroneckerBasis.of(curvature)
    sides = zip((basis.left, basis.right), shape, strict=True)
    vectors = [torch.eye(side).double() if known is None else known.contiguous() for known, side in sides]
    return torch.kron(vectors[0], vectors[1])


@pytest.mark.parametrize("fields", [{}, {"largest_side": 6}], ids=str)
@pytest.mark.parametrize("name", models())
def test_moments_are_the_best_diagonal_in_the_eigenbasis(name: str, fields):
    handle, each, before, after = two_steps(name, damping=0.1, **fields)
    for layer, curvature in handle.curvature.items():
        fisher = dense_fisher(handle.model, layer, each)
        shape = (before[layer].shape[0], before[layer].shape[1])
        basis, moments = dense_basis(curvature, shape), averaged(curvature, "moments").flatten()
        torch.testing.assert_close(moments, (basis.mT @ fisher @ basis).diagonal(), rtol=1e-10, atol=1e-12)
        products = torch.outer(curvature["outputs.values"], curvature["inputs.values"]).flatten()
        ours, theirs = ((fisher - basis @ d.diag() @ basis.mT).norm() for d in (moments, products))
        assert float(ours) < float(theirs), layer
        system = basis @ (moments + 0.1).diag() @ basis.mT
        torch.testing.assert_close(after[layer].flatten(), torch.linalg.solve(system, before[layer].flatten()))


def test_the_first_step_is_that_of_kronecker_factors():
    model, x = models()["convolutions"]
    _, before, after = step(model, Ekfac(damping=0.1), x, torch.arange(len(x)) % 3)
    model, x = models()["convolutions"]
    wanted = step(model, rankwise.preconditioners.Kfac(damping=0.1), x, torch.arange(len(x)) % 3)[2]
    for layer, natural in after.items():
        torch.testing.assert_close(natural, wanted[layer], rtol=1e-11, atol=1e-13)
    assert before.keys() == after.keys()


def test_moments_of_positions_differ_from_those_of_samples_only_where_samples_have_several():
    alike = {}
    for name, layer in (("linear", "0"), ("convolutions", "0")):
        by_samples, by_positions = (
            averaged(two_steps(name, **fields)[0].curvature[layer], "moments")
            for fields in ({}, {"moments": expanded})
        )
        alike[name] = torch.allclose(by_samples, by_positions)
    assert alike == {"linear": True, "convolutions": False}


def test_one_sample_is_the_exact_fisher_matrix():
    found = []
    for method in (Ekfac(damping=0.3), Sngd(damping=0.3)):
        model, x = models()["linear"]
        handle = rankwise.precondition(model, method)
        for _ in range(2):
            model.zero_grad()
            functional.cross_entropy(model(x[:1]), torch.tensor([2])).backward()
            handle.step()
        found.append(matrices(model, gradients=True))
    for layer, natural in found[0].items():
        torch.testing.assert_close(natural, found[1][layer], rtol=1e-11, atol=1e-13)


def test_a_new_basis_takes_the_moments_along():
    """Of a Fisher matrix that is diagonal in the old basis, the new one has the exact diagonal."""
    model, x = models()["linear"]
    handle, *_ = step(model, Ekfac(every=1), x, torch.arange(len(x)) % 3)
    for i in (1, 2):
        old = {name: tensor.clone() for name, tensor in handle.curvature["0"].items()}
        model.zero_grad()
        functional.cross_entropy(model(x.roll(i, 1)), (torch.arange(len(x)) + i) % 3).backward()
        handle.step()
    new = handle.curvature["0"]
    assert not torch.allclose(new["inputs.vectors"], old["inputs.vectors"])
    shared = torch.lerp(_moments(model, x.roll(2, 1), (torch.arange(len(x)) + 2) % 3, old), old["moments"], 0.95)
    before, after = dense_basis(old, (7, 6)), dense_basis(new, (7, 6))
    carried = (after.mT @ before @ shared.flatten().diag() @ before.mT @ after).diagonal()
    torch.testing.assert_close(new["moments"].flatten(), carried)


def _moments(model: nn.Module, x: Tensor, y: Tensor, curvature: dict[str, Tensor]) -> Tensor:
    fisher = dense_fisher(model, "0", of_each_sample(model, x, y))
    basis = dense_basis(curvature, (7, 6))
    return (basis.mT @ fisher @ basis).diagonal().view(7, 6)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("tokens", [False, True])
def test_squares_of_samples(positions: int, tokens: bool, monkeypatch):
    monkeypatch.setattr("rankwise.linalg.khatri_rao.CHUNK", 40)  # in several parts
    rng = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, positions, 3, generator=rng).double()
    inputs = torch.randint(0, 4, (5, positions), generator=rng)
    if not tokens:
        inputs = torch.randn(5, positions, 4, generator=rng).double()
    samples = KhatriRao(inputs, gradients, 4)
    torch.testing.assert_close(samples.squares(), samples.matrices().square().sum(0))


def test_failures_keep_the_previous_basis_and_its_moments(monkeypatch):
    handle, *_ = two_steps("linear", every=2)
    model, (_, x) = handle.model, models()["linear"]
    kept = {name: tensor.clone() for name, tensor in handle.curvature["0"].items() if "values" in name}

    def fails(matrix: Tensor):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    model.zero_grad()
    functional.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    with pytest.warns(RuntimeWarning, match="The previous one stays in use"):
        handle.step()
    assert all(torch.equal(handle.curvature["0"][name], tensor) for name, tensor in kept.items())
    assert len(factors(handle.curvature["0"], (7, 6))) == 2


def test_moments_that_overflow_are_not_taken_in():
    model = nn.Linear(3, 2)
    handle = rankwise.precondition(model, Ekfac())
    x, signs = torch.ones(4, 3), torch.tensor([[1e25], [-1e25], [1e25], [-1e25]])
    for scale in (0.0, 1.0, 0.0):
        model.zero_grad()
        model(x).sum().backward()
        (model(x) * signs * scale).sum().backward()  # huge samples whose sum is not
        if scale:
            with pytest.warns(RuntimeWarning, match="not finite are not taken in"):
                handle.step()
        else:
            handle.step()
    assert bool(handle.curvature[""]["moments"].isfinite().all())


def test_all_processes_need_all_bases(monkeypatch):
    monkeypatch.setattr(conditioning.Exchange, "__init__", _two)
    with pytest.raises(ValueError, match="Ekfac needs all inverses on all processes; take workers=1"):
        rankwise.precondition(nn.Linear(2, 2), Ekfac(), workers=0.5)


def _two(self, traffic, group=None, device=None) -> None:
    """Stand for the first of two processes."""
    self.traffic, self.group, self.size, self.rank = traffic, group, 2, 0


def test_wrong_fields():
    with pytest.raises(ValueError, match="every must be a multiple"):
        Ekfac(every=3, factors_every=2)
