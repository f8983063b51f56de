"""How far long loops are: a bar on a terminal, silence in a pipe, or lines for whoever listens."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_LISTENER: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Have a function called with what :func:`tell` is told inside."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(words: str) -> None:
    """Say in a line how far something is, unless a bar on a terminal does or nobody listens."""
    listener = _LISTENER.get()
    if listener is not None and not sys.stderr.isatty():
        listener(words)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and, if standard error is a terminal, show how far the loop is.

    Args:
        items: what to loop over.
        description: a few words.
        total: how many items there are, where ``len(items)`` does not tell.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(items, description, total=total, console=Console(stderr=True), transient=True)


@contextmanager
def gauge(description: str) -> Iterator[Callable[[float, str], None]]:
    """Give a function that shows a share in [0, 1] and a few words, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda share, words: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=1.0)
        yield lambda share, words: progress.update(task, completed=share, description=f"{description}: {words}")
