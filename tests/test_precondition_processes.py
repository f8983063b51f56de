"""Several processes make the same natural gradients as one: real ones, which talk through gloo."""

import multiprocessing
from pathlib import Path

import pytest
from preconditioned import ALL, QUICK, work

SECONDS = 240  # until processes are given up


def outcomes(world: int, folder: Path, checks: list) -> None:
    """Let some processes make some checks, in one go."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, world, folder, checks)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
        worker.kill()
    for check in checks:
        for rank in range(world):
            note = folder / f"{check.__name__}.{rank}"
            assert note.exists(), f"{check.__name__}: process {rank} did not get so far, nor say why."
            assert not note.read_text(), f"{check.__name__}, process {rank}: {note.read_text()}"


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    outcomes(2, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes(world: int, tmp_path: Path):
    outcomes(world, tmp_path, ALL)
