"""GradNormLoRP: weight normalisation of a changed weight, with and without the norms' gradient."""

import pytest
import torch
from contracts.examples import draw
from torch import Generator, Tensor, nn

from rankwise.adapters import GradNormLorp, Lora
from rankwise.initialisers import SingularVectors
from rankwise.matrices import Base, Branch, Dense, LowRank, RowNormalised

M, N, SCALE = 7, 5, 1.5


def changed(constant: bool, start: bool = False) -> RowNormalised:
    """An adapted matrix whose numbers have all moved."""
    method = GradNormLorp(
        rank=2, alpha=2 * SCALE, constant=constant, **({"start": SingularVectors()} if start else {})
    )
    matrix = method.attach(Base(Dense(draw(M, N))), {}, Generator().manual_seed(0)).eval()
    assert isinstance(matrix, RowNormalised)
    with torch.no_grad():
        for i, p in enumerate(p for p in matrix.parameters() if p.requires_grad):
            p += 0.3 * draw(*p.shape, seed=i)
    return matrix


def direction(matrix: RowNormalised, left: Tensor, right: Tensor) -> Tensor:
    """V, from the formula."""
    frozen = [p for p in matrix.update.parameters() if not p.requires_grad]
    start = frozen[0] @ frozen[1] if frozen else 0.0
    return matrix.base.dense() + SCALE * (left @ right - start)


def trained(matrix: nn.Module) -> dict[str, Tensor]:
    return {name.split(".")[-1]: p for name, p in matrix.named_parameters() if p.requires_grad}


def gradients(matrix: RowNormalised, slope: Tensor) -> dict[str, Tensor]:
    """Those of <slope, W'>, through the forward pass."""
    own = trained(matrix)
    found = torch.autograd.grad((matrix(torch.eye(N, dtype=torch.float64)).mT * slope).sum(), list(own.values()))
    return dict(zip(own, found, strict=True))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_values_and_gradients_are_those_of_the_formula(constant: bool, start: bool):
    matrix, slope = changed(constant, start), draw(M, N, seed=9)
    own = {name: p.detach().clone().requires_grad_() for name, p in trained(matrix).items()}
    v = direction(matrix, own["left"], own["right"])
    norms = v.norm(dim=1)
    weight = (own["lengths"] / (norms.detach() if constant else norms))[:, None] * v
    torch.testing.assert_close(matrix.dense(), weight)
    wanted = torch.autograd.grad((weight * slope).sum(), list(own.values()))
    for name, expected in zip(own, wanted, strict=True):
        torch.testing.assert_close(gradients(matrix, slope)[name], expected)


def test_the_gradients_by_hand():
    """B's is s G_V A' with G_V = c / |V| (G - (G v) v), where the published code leaves the last term out."""
    slope = draw(M, N, seed=9)
    for constant in (False, True):
        matrix = changed(constant)
        own = trained(matrix)
        v = direction(matrix, own["left"], own["right"]).detach()
        unit = v / v.norm(dim=1, keepdim=True)
        along = (slope * unit).sum(1, keepdim=True)
        rest = slope if constant else slope - along * unit
        factor = own["lengths"].detach()[:, None] / v.norm(dim=1, keepdim=True)
        found = gradients(matrix, slope)
        torch.testing.assert_close(found["left"], SCALE * (factor * rest) @ own["right"].detach().mT)
        torch.testing.assert_close(found["lengths"], along[:, 0])
        assert bool((along.abs() > 1e-3).all())  # the two are different


def test_it_is_dora_where_norms_are_constants():
    base = Base(Dense(draw(M, N)))
    one = GradNormLorp(rank=2, alpha=3.0, dropout=0.0).attach(base, {}, Generator().manual_seed(0))
    two = Lora(rank=2, alpha=3.0, magnitudes=True).attach(base, {}, Generator().manual_seed(0))
    assert one.spec() == two.spec()
    state = two.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def whole() -> Branch:
    """B I, in which all of the update trains."""
    low = LowRank(torch.zeros(M, N, dtype=torch.float64), torch.eye(N, dtype=torch.float64))
    low.right.requires_grad_(False)
    return Branch(low)


def test_at_full_rank_it_is_weight_normalisation():
    """With A = I and the norms' gradient, SGD goes where it goes with torch's weight_norm; rows of V grow."""
    weight = draw(M, N)
    plain = nn.utils.parametrizations.weight_norm(nn.Linear(N, M, bias=False).double(), dim=0)
    plain.weight = weight.clone()
    ours, constant = (RowNormalised.of(Base(Dense(weight)), whole(), kept) for kept in (False, True))
    x, y = draw(20, N, seed=2), draw(20, M, seed=3)
    before = weight.norm(dim=1)
    for model in (plain, ours, constant):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            if model is ours:
                now = ours.row_lengths().detach()
                assert bool((now >= before).all())
                before = now
    torch.testing.assert_close(ours.dense(), plain.weight)
    assert not torch.allclose(constant.dense(), plain.weight, rtol=1e-3)


@pytest.mark.parametrize("constant", [False, True])
def test_rows_of_zeros_stay_finite(constant: bool):
    weight = draw(M, N)
    weight[2] = 0
    method = GradNormLorp(rank=2, constant=constant, dropout=0.0)
    matrix = method.attach(Base(Dense(weight)), {}, Generator().manual_seed(0))
    torch.testing.assert_close(matrix.dense(), weight)
    optimizer = torch.optim.AdamW([p for p in matrix.parameters() if p.requires_grad], lr=0.01)
    x, y = draw(20, N, seed=2), draw(20, M, seed=3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (matrix(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(bool(p.isfinite().all()) for p in matrix.parameters())
    assert losses[-1] < losses[0]
