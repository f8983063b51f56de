"""All that processes check together, so that they are started once; see test_exchange.py."""

from pathlib import Path

from core import replicas, shards
from processes import Checks


def quick(folder: Path) -> Checks:
    return {**replicas.quick(), **replicas.runs(folder), **shards.quick()}


def four() -> Checks:
    return {**replicas.joint(), **shards.four()}


def every() -> Checks:
    return {**replicas.every(), **shards.every()}
