"""Compiled steps: those that are not compiled, but for rounding."""

import copy
from typing import Any

import pytest
import torch
from contracts.examples import draw
from torch import Tensor, nn

from rankwise import Optimizer
from rankwise.core.kernels import compiling, kernel
from rankwise.core.transforms import Transform
from rankwise.optimizers import adam, galore

SHAPES = ((24, 60), (60, 24), (24, 60), (7,), (1,))


def trained(transform: Transform, compiled: bool) -> list[Tensor]:
    """Parameters after some steps; in the middle the optimiser is copied, as a pickle would."""
    params = [nn.Parameter(draw(*shape, seed=i).float()) for i, shape in enumerate(SHAPES)]
    optimizer = Optimizer([(params, transform)], lr=0.01, weight_decay=0.1, compiled=compiled)
    for step in range(6):
        for i, param in enumerate(params):
            param.grad = draw(*param.shape, seed=10 * step + i).float()
        optimizer.step()
        if step == 2:
            optimizer = copy.deepcopy(optimizer)
            params = optimizer.param_groups[0]["params"]
    assert optimizer.compiled is compiled
    return params


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
@pytest.mark.parametrize(
    "transform", [adam(), adam(early_eps=True), galore(rank=4, every=3)], ids=["adam", "early", "galore"]
)
def test_compiled_steps_are_the_same(transform: Transform):
    torch.compiler.reset()  # the limit of recompilations counts all tests of a process
    for one, two in zip(trained(transform, False), trained(transform, True), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for_is_compiled(monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []

    def spy(function: Any, **_: Any) -> Any:
        made.append(function)
        return function

    monkeypatch.setattr(torch, "compile", spy)
    twice = kernel(lambda x: 2 * x)
    assert twice(3) == 6
    assert made == []
    with compiling(True):
        assert twice(3) == twice(1.5) * 2 == 6
        with compiling(False):
            assert twice(4) == 8
    assert twice(5) == 10
    assert len(made) == 1


def test_where_nothing_can_be_compiled_it_says_so(monkeypatch: pytest.MonkeyPatch):
    def broken(function: Any, **_: Any) -> Any:
        raise OSError("no compiler was found")

    monkeypatch.setattr(torch, "compile", broken)
    weight = nn.Parameter(torch.ones(3))
    Optimizer([([weight], adam())], lr=0.1)
    with pytest.raises(RuntimeError, match=r"no compiler was found(.|\n)*leave compiled out"):
        Optimizer([([weight], adam())], lr=0.1, compiled=True)
