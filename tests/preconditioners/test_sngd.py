"""The natural gradient of a batch is that of the dense Fisher matrix."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import rankwise
from rankwise.linalg import expanded
from rankwise.preconditioners import Sngd


class Twice(nn.Module):
    """An embedding, and a layer that is called twice, on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice, self.out = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(torch.tanh(self.twice(self.table(x))))
        return self.out(y.cumsum(1)).mean(1)


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    linear = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return {
        "linear": (linear.double(), torch.randn(9, 5).double()),
        "convolutions": (convolutions.double(), torch.randn(6, 2, 6, 6).double()),
        "sequences": (Twice().double(), torch.randint(0, 11, (6, 5))),
    }


def of_each_sample(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of the samples' own losses, from automatic differentiation."""

    def loss(parameters, a: Tensor, b: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, parameters, (a[None],)), b[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", models())
def test_it_solves_the_dense_system(name: str, together: bool):
    model, x = models()[name]
    y, damping = torch.arange(len(x)) % 3, 0.1
    each = of_each_sample(model, x, y)
    handle = rankwise.precondition(model, Sngd(damping=damping, together=together), tables=True)
    functional.cross_entropy(model(x), y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    handle.step()
    found = {name: p.grad for name, p in model.named_parameters()}
    layers: dict[str, list[str]] = {}
    for parameter in plain:
        layers.setdefault("all" if together else parameter.rpartition(".")[0], []).append(parameter)
    for names in layers.values():
        u = torch.cat([each[name].flatten(1) for name in names], 1)  # (N, d)
        v = torch.cat([plain[name].flatten() for name in names])
        fisher = u.mT @ u / len(x) + damping * torch.eye(len(v), dtype=v.dtype)
        wanted = torch.linalg.solve(fisher, v)
        torch.testing.assert_close(torch.cat([found[name].flatten() for name in names]), wanted)


def test_samples_twice_change_nothing():
    found = []
    for copies in (1, 3):
        model, x = models()["linear"]
        handle = rankwise.precondition(model, Sngd(damping=1e-3))
        y = torch.arange(len(x)) % 3
        functional.cross_entropy(model(x.repeat(copies, 1)), y.repeat(copies)).backward()
        handle.step()
        found.append(model[0].weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def test_it_is_the_gradient_of_a_loss_with_other_weights_of_samples():
    """(F + a I)^-1 U 1/N = U (K/N + a I)^-1 1/N, where the plain gradient is U 1/N."""
    model, x = models()["linear"]
    y, damping = torch.arange(len(x)) % 3, 0.05
    each = torch.cat([g.flatten(1) for g in of_each_sample(model, x, y).values()], 1)
    ones = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
    weights = torch.linalg.solve(each @ each.mT / len(x) + damping * torch.eye(len(x), dtype=x.dtype), ones)
    losses = functional.cross_entropy(model(x), y, reduction="none")
    wanted = torch.autograd.grad((weights * losses).sum(), [*model.parameters()])
    handle = rankwise.precondition(model, Sngd(damping=damping, together=True))
    functional.cross_entropy(model(x), y).backward()
    handle.step()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_much_damping_leaves_the_gradient():
    model, x = models()["convolutions"]
    y = torch.arange(len(x)) % 3
    handle = rankwise.precondition(model, Sngd(damping=1e9))
    functional.cross_entropy(model(x), y).backward()
    before = model[0].weight.grad.clone()
    handle.step()
    torch.testing.assert_close(1e9 * model[0].weight.grad, before, rtol=1e-6, atol=1e-9)


def test_positions_by_themselves_have_no_common_kernel():
    with pytest.raises(ValueError, match="together needs the samples"):
        Sngd(together=True, sharing=expanded)
