"""A window of gradients is the dense matrix that they make."""

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.preconditioners import MFac


def walk(method: MFac, steps: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Gradients (steps, d) that a layer was given, and what became of them."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).to(dtype)
    handle, given, found = rankwise.precondition(layer, method), [], []
    for _ in range(steps):
        layer.weight.grad, layer.bias.grad = torch.randn(3, 5).to(dtype), torch.randn(3).to(dtype)
        given.append(torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten())
        assert handle.step()
        found.append(torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten())
    return torch.stack(given), torch.stack(found)


@pytest.mark.parametrize("mean_over_all", [False, True])
@pytest.mark.parametrize("length", [1, 4, 30])
def test_each_step_solves_the_dense_system_of_the_last_gradients(length: int, mean_over_all: bool):
    given, found = walk(MFac(gradients=length, damping=1e-2, mean_over_all=mean_over_all), 11)
    for t, (gradient, natural) in enumerate(zip(given, found, strict=True)):
        last = given[max(0, t + 1 - length) : t + 1]
        fisher = last.mT @ last / (length if mean_over_all else len(last))
        wanted = torch.linalg.solve(fisher + 1e-2 * torch.eye(18).double(), gradient)
        torch.testing.assert_close(natural, wanted, rtol=1e-9, atol=1e-10)


def test_the_first_step_is_longer_by_the_length_of_the_window_if_all_are_counted():
    own, all_counted = (walk(MFac(gradients=100, mean_over_all=each), 1)[1] for each in (False, True))
    assert float(all_counted.norm() / own.norm()) == pytest.approx(100, rel=1e-3)


def test_one_gradient_and_much_damping_is_the_gradient_divided():
    given, found = walk(MFac(gradients=1, damping=1e8), 3)
    torch.testing.assert_close(1e8 * found, given, rtol=1e-6, atol=1e-7)


def test_together_has_the_terms_between_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    handle, given = rankwise.precondition(model, MFac(gradients=3, damping=0.1, together=True)), []
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).double()
        given.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        handle.step()
    last = torch.stack(given[-3:])
    wanted = torch.linalg.solve(last.mT @ last / 3 + 0.1 * torch.eye(18).double(), given[-1])
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), wanted)


def test_half_precision_storage_halves_the_memory_and_bears_enough_damping():
    errors = {}
    for damping in (1e-1, 1e-5):
        exact, rounded = (
            walk(MFac(gradients=8, damping=damping, storage=storage), 12, torch.float32)[1]
            for storage in (None, torch.bfloat16)
        )
        errors[damping] = float((rounded - exact).norm() / exact.norm())
    assert errors[1e-1] < 0.05
    assert errors[1e-5] > 10 * errors[1e-1]
    layer = nn.Linear(5, 3)
    handle = rankwise.precondition(layer, MFac(gradients=8, storage=torch.bfloat16))
    layer(torch.randn(2, 5)).sum().backward()
    handle.step()
    assert handle.curvature[""]["rows"].nbytes == 8 * 18 * 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gradients": 0}, "gradients must be"),
        ({"damping": 0.0}, "damping must be"),
        ({"storage": torch.int8}, "storage must be"),
    ],
)
def test_wrong_arguments(fields, words: str):
    with pytest.raises(ValueError, match=words):
        MFac(**fields)


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_little_damping_is_borne_in_single_precision(size: float):
    """The present gradient is in the window: nothing may be divided by the damping that cancels before."""
    method = MFac(gradients=4, damping=1e-5)
    single: dict[str, Tensor] = {}
    rows: list[Tensor] = []
    for step in range(7):
        gradient = torch.randn(3, 50, generator=torch.Generator().manual_seed(step)) * size / 150**0.5
        rows = [*rows, gradient.flatten().double()][-4:]
        method.observe([gradient], single, 1e-5)
        (found,) = method.apply([gradient], single, 1e-5)
        window = torch.stack(rows)
        exact = torch.linalg.solve(window.T @ window / len(rows) + 1e-5 * torch.eye(150), rows[-1])
        error = (found.flatten().double() - exact).norm() / exact.norm()
        assert error < 1e-4
