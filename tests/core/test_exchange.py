"""Processes that exchange gradients, reduced or in parts, train as one process on the joint batch."""

from pathlib import Path

import pytest
import torch
from core import exchanges
from processes import together
from torch import nn

from rankwise import Optimizer, Replicated
from rankwise.optimizers import adam


def no_failure(found: dict[str, str]) -> None:
    assert found
    assert not any(found.values()), "\n".join(f"{name} {text}" for name, text in found.items() if text)


def test_two_processes_are_as_one(tmp_path: Path):
    no_failure(together(exchanges.quick, 2, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_optimiser(world: int, tmp_path: Path):
    no_failure(together(exchanges.every, world, tmp_path))


def test_processes_must_be_there():
    with pytest.raises(ValueError, match="init_process_group"):
        Replicated(Optimizer([([nn.Parameter(torch.ones(2))], adam())], lr=0.1))
