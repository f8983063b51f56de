"""Several processes make the same natural gradients as one: real ones, which talk through gloo."""

import multiprocessing
from pathlib import Path

import pytest
from preconditioned import ALL, work

SECONDS = 240  # until processes are given up


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes(world: int, tmp_path: Path):
    """All checks in one go."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, world, tmp_path, ALL)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
        worker.kill()
    for check in ALL:
        for rank in range(world):
            note = tmp_path / f"{check.__name__}.{rank}"
            assert note.exists(), f"{check.__name__}: process {rank} did not get so far, nor say why."
            assert not note.read_text(), f"{check.__name__}, process {rank}: {note.read_text()}"
