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
        if not _several():
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


def alone(command: Callable[..., None]) -> Callable[..., None]:
    """Refuse a launcher's processes before a command that knows one."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if _several():
            raise ValueError(
                f"rankwise {command.__name__} runs in one process, but a launcher started several; leave "
                "it out, or write a loop with DistributedDataParallel or the Trainer, and rankwise.follow."
            )
        command(*args, **kwargs)

    return run


@contextlib.contextmanager
def first_first() -> Iterator[None]:
    """Let the first of several processes do what is inside before the others."""
    if not leads():
        dist.barrier()
    yield
    if leads() and dist.is_initialized():
        dist.barrier()


def _several() -> bool:
    """Whether a launcher started this process and others."""
    return all(name in os.environ for name in NEEDED) and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
