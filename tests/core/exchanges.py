"""All that processes check together, so that they are started once; see test_exchange.py."""

from core import replicas, shards
from processes import Checks


def quick() -> Checks:
    return {**replicas.quick(), **shards.quick()}


def four() -> Checks:
    return {**replicas.joint(), **shards.four()}


def every() -> Checks:
    return {**replicas.every(), **shards.every()}
