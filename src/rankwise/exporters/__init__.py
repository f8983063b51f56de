"""Formats that other tools read. What ``__all__`` names is what ``rankwise export --to`` offers."""

from .dense import Dense

__all__ = ["Dense"]
