"""Commands that torchrun or accelerate may start in several processes."""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..core.processes import leads

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched(command: Callable[..., None]) -> Callable[..., None]:
    """Let the processes of a launcher meet before a command; the first one speaks, and each tells its errors."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if not all(name in os.environ for name in NEEDED) or int(os.environ["WORLD_SIZE"]) == 1:
            return command(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        try:
            with contextlib.nullcontext() if leads() else _silent():
                command(*args, **kwargs)
        finally:
            dist.destroy_process_group()

    return run


@contextlib.contextmanager
def first_first() -> Iterator[None]:
    """Let the first of several processes do what is inside before the others."""
    if not leads():
        dist.barrier()
    yield
    if leads() and dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
