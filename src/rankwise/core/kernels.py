"""Steps number by number, which may be compiled into one pass over memory."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_compiled: ContextVar[bool] = ContextVar("compiled", default=False)


@contextlib.contextmanager
def compiling(on: bool) -> Iterator[None]:
    """Let kernels be compiled inside, or not."""
    before = _compiled.set(on)
    try:
        yield
    finally:
        _compiled.reset(before)


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of tensors and numbers that becomes one loop inside of ``compiling``."""

    @functools.cache
    def compiled() -> Any:
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled()(*args, **kwargs) if _compiled.get() else function(*args, **kwargs)

    return call


def check_compiler(device: torch.device) -> None:
    """Raise RuntimeError unless something can be compiled for a device; takes some seconds."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(3, device=device))
    except Exception as error:
        raise RuntimeError(
            f"torch.compile does not work on {device.type} here: {error}\nSteps need a C++ compiler on a CPU and "
            "Triton on CUDA to be compiled; leave compiled out to take them as they are."
        ) from error
