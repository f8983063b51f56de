"""What choices cost in time: measured on the matrices themselves, once for all layers of one shape."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..matrices import Dense, StructuredMatrix
from .choices import UNITS, Choices

Timer = Callable[[Sequence[StructuredMatrix]], Sequence[float]]
"""Says how many nanoseconds each of some matrices of one shape takes for an input row."""

TIMED = 12  # about so many choices of a layer are timed; costs in between follow the multiply-adds


@dataclass(frozen=True)
class Latency:
    """What the choices of a layer, and its dense weight, take.

    Args:
        costs: (k,) integers: nanoseconds an input row; for what is as large as the dense weight no less than
            its own.
        dense: the same of the weight as it is.
        table: what was measured: shape, kind, rank and nanoseconds.
    """

    costs: Tensor
    dense: int
    table: list[dict[str, Any]]


def time_matrices(matrices: Sequence[StructuredMatrix], *, rows: int = 64, repeats: int = 15) -> list[float]:
    """Time matrices of one shape: they take turns, and the median over the turns counts, after one to warm up.

    Args:
        matrices: any kinds, in one type and on one device.
        rows: inputs at once: many as in reading a prompt, 1 as in writing token by token. So many that a product
            takes longer than a few milliseconds are timed badly on a machine with other work.
        repeats: turns.

    Returns:
        nanoseconds an input row, for each.
    """
    like = next(t for t in matrices[0].state_dict().values() if t.is_floating_point())
    x = torch.ones(rows, matrices[0].shape[1], dtype=like.dtype, device=like.device)
    with torch.inference_mode():
        turns = [[_nanoseconds(matrix, x) for matrix in matrices] for _ in range(repeats + 1)]
    return [statistics.median(times) / rows for times in zip(*turns[1:], strict=True)]


def latencies(choices: Mapping[str, Choices], weights: Mapping[str, Tensor], timer: Timer) -> dict[str, Latency]:
    """Measure the choices of all layers; those of layers with equal shapes and costs are measured once.

    Of many choices some are timed. Between two of the same structure time follows the multiply-adds.

    Args:
        choices: by layer.
        weights: (m, n), by layer.
        timer: such as :func:`time_matrices`.
    """
    known: dict[Any, Latency] = {}
    found = {}
    for name, offer in choices.items():
        weight = weights[name]
        stated = tuple(tuple(offer.costs[unit].tolist()) for unit in UNITS)
        key = (tuple(weight.shape), weight.dtype, weight.device, stated)
        if key not in known:
            known[key] = _latency(offer, weight, timer)
        found[name] = known[key]
    return found


def _latency(choices: Choices, weight: Tensor, timer: Timer) -> Latency:
    samples = _samples(choices)
    matrices = [Dense(weight), *samples.values()]
    times = list(timer(matrices))
    shape = list(weight.shape)
    table = [
        {"shape": shape, "kind": _kind(matrix.spec()), "rank": matrix.rank, "ns_per_row": round(each, 1)}
        for matrix, each in zip(matrices, times, strict=True)
    ]
    costs = _between(dict(zip(samples, times[1:], strict=True)), choices.costs["macs"].tolist())
    dense, *whole = [max(round(each), 1) for each in (times[0], *costs)]
    smaller = choices.costs["bytes"] < weight.numel() * weight.element_size()
    whole = torch.tensor(whole, dtype=torch.int64)
    return Latency(torch.where(smaller, whole, whole.clamp_min(dense)), dense, table)


def _samples(choices: Choices) -> dict[int, StructuredMatrix]:
    """Build some choices: all of a few, else such that those in between are like both neighbours."""
    count = len(choices.errors)
    found: dict[int, StructuredMatrix] = {}

    def build(i: int) -> StructuredMatrix:
        if i not in found:
            found[i] = choices.build(i)
        return found[i]

    def split(low: int, high: int) -> None:
        alike = _kind(build(low).spec()) == _kind(build(high).spec())
        if high - low > 1 and (high - low > count / TIMED or not alike):
            middle = (low + high) // 2
            split(low, middle)
            split(middle, high)

    if count:
        split(0, count - 1)
    return dict(sorted(found.items()))


def _between(times: Mapping[int, float], macs: Sequence[int]) -> list[float]:
    """Fill in what was not timed, by the multiply-adds between the two neighbours that were."""
    timed = sorted(times)
    costs = [times.get(i, 0.0) for i in range(len(macs))]
    for low, high in itertools.pairwise(timed):
        span = macs[high] - macs[low]
        for i in range(low + 1, high):
            part = (macs[i] - macs[low]) / span if span else (i - low) / (high - low)
            costs[i] = times[low] + part * (times[high] - times[low])
    return costs


def _kind(spec: Mapping[str, Any]) -> str:
    """Name the structure of a spec, without its sizes: ``Sum(Quantized, LowRank)``."""
    inner = [*spec.get("members", []), *([spec["matrix"]] if "matrix" in spec else [])]
    return spec["kind"] + (f"({', '.join(map(_kind, inner))})" if inner else "")


def _nanoseconds(matrix: StructuredMatrix, x: Tensor) -> int:
    start = _now(x)
    matrix(x)
    return _now(x) - start


def _now(like: Tensor) -> int:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter_ns()
