"""Runs checks in several processes that can talk to each other, and says in which they failed."""

import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Checks = Mapping[str, Callable[[], None]]


def together(checks: Callable[[], Checks], world: int, folder: Path) -> dict[str, str]:
    """Run checks in each of some processes, with gloo.

    Args:
        checks: of a module that can be imported; makes them, the same in all processes.
        world: how many.
        folder: an empty one.

    Returns:
        for each check the tracebacks of the processes in which it failed, or nothing.
    """
    mp.start_processes(_work, (checks, world, str(folder)), nprocs=world, start_method="spawn")
    each = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return {name: "".join(found[name] for found in each) for name in each[0]}


def _work(rank: int, checks: Callable[[], Checks], world: int, folder: str) -> None:
    file, most = f"file://{folder}/meeting", timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world, timeout=most)
    failed = {}
    for name, check in checks().items():
        try:
            check()
            failed[name] = ""
        except Exception:
            failed[name] = f"in process {rank}:\n{traceback.format_exc()}"
    torch.save(failed, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
