"""Processes that exchange gradients, reduced or in parts, train as one process on the joint batch."""

import functools
from pathlib import Path

import pytest
import torch
from core import exchanges, replicas, shards
from processes import together
from torch import nn

from rankwise import Optimizer, Replicated
from rankwise.optimizers import adam


def no_failure(found: dict[str, str]) -> None:
    assert found
    assert not any(found.values()), "\n".join(f"{name} {text}" for name, text in found.items() if text)


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path: Path):
    no_failure(together(functools.partial(exchanges.quick, tmp_path), 2, tmp_path))


@pytest.mark.slow
def test_four_processes_are_as_one(tmp_path: Path):
    no_failure(together(exchanges.four, 4, tmp_path))


@pytest.mark.slow
def test_every_optimiser(tmp_path: Path):
    no_failure(together(exchanges.every, 2, tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_goes_on_where_two_stopped(tmp_path: Path):
    """In the middle of a period of refreshes, by torch's two ways of saving."""
    no_failure(together(functools.partial(shards.saving, tmp_path), 2, tmp_path))
    for name in shards.SAVED:
        net, optimizer = shards.small(shards.QUICK[name], sharded=False)
        shards.learn(net, optimizer, range(9))
        for whole in (False, True):
            other, resumed = shards.loaded(tmp_path, name, whole=whole)
            shards.learn(other, resumed, range(5, 9))
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_a_run_of_two_processes_is_one_run(tmp_path: Path):
    """Stopped in two, it goes on in one, and ends where one alone does."""
    no_failure(together(functools.partial(replicas.training, tmp_path), 2, tmp_path))
    for name in replicas.RUNS:
        ends = [replicas.task(name, folder) for folder in (None, tmp_path / name)]
        for p, q in zip(*(end.parameters() for end in ends), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_processes_must_be_there():
    with pytest.raises(ValueError, match="init_process_group"):
        Replicated(Optimizer([([nn.Parameter(torch.ones(2))], adam())], lr=0.1))
