"""The verb that says how a model can be trained in so much memory, before anything is made."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .core.hidden import hidden_matrices
from .core.labels import given
from .core.live import LiveBytes, pass_bytes, without_numbers
from .core.memory import gradient_bytes, held_bytes
from .core.modes import recomputing
from .core.optimizer import Optimizer
from .core.progress import track
from .core.report import Report
from .core.states import leaves
from .core.stored import Batched
from .core.transforms import Transform, state_bytes
from .core.writing import usual_write
from .models.causal import check_head
from .models.fresh import causal_attention, fresh, read_config
from .optimizers import adafactor, adam, adamw8bit, frugal, galore, muon, q_galore
from .pretraining import parameter_groups

CANDIDATES: Mapping[str, Transform] = {
    "adam": adam(),
    "adamw8bit": adamw8bit(),
    "muon": muon(),
    "galore --set rank=0.5": galore(rank=0.5),
    "frugal": frugal(),
    "galore --set rank=0.25": galore(rank=0.25),
    "q-galore --set rank=0.25": q_galore(rank=0.25),
    "galore --set rank=0.125": galore(rank=0.125),
    "adafactor": adafactor(),
}
"""Optimisers by the words for ``rankwise train --optimizer``, those that keep most of the gradients first."""

SAMPLE, STEPS = (192, 192), 2  # what a step holds is counted on these; square ones have the largest factors
STACK = 2**26  # bytes of gradients that are stepped together on a GPU
WHOLE = 8  # bytes a number that a step of slices holds beside: gradient and direction of all slices
MOST = 64  # sequences at a time, where not more are wanted
GIB = 2**30


def plan(
    model: Any,
    memory: int,
    *,
    batch: int = 8,
    window: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = None,
    candidates: Mapping[str, Transform] = CANDIDATES,
    reserve: float = 0.1,
) -> Report:
    """Find out which optimisers, batches and savings let all of a language model be trained in so much memory.

    Nothing of the model's size is made. Weights and optimiser states are counted exactly. A forward and backward
    pass is run without numbers (fake tensors), and all that it holds at its worst moment is counted: activations,
    gradients, logits, each as long as it lives; fused attention makes no mask. What a step holds beside
    that is counted over some steps of a small matrix, and taken to grow with what is stepped together. What
    libraries and kernels take and what fragments is left to ``reserve``.

    Savings are tried in this order, until ``batch`` fits: none; gradient checkpointing, which takes about a third
    more time; layer-wise steps, which do not clip; both. If none lets ``batch`` fit, the one with most sequences
    at a time is taken.

    Args:
        model: what :func:`rankwise.models.read_config` takes, a config of transformers, or a model, of which only
            the config is looked at.
        memory: in bytes.
        batch: sequences at a time that are wanted.
        window: tokens of a sequence.
        dtype: of the weights.
        autocast: of the computation, as for :func:`rankwise.train`.
        candidates: transforms of hidden matrices by name, the ones to try first in front; all else gets Adam.
        reserve: share of the memory that stays free.

    Returns:
        a row for each candidate, what is best to try first: those that fit, in the order given; then those that
        do not, the smallest first. Sizes are in GiB: ``weights``; ``state`` of the optimiser; ``pass`` what a
        forward and backward pass holds; ``step`` what a step holds, gradients included; ``total`` weights, state
        and the larger of both, or with layer-wise steps, which happen within the pass, their sum.

    Raises:
        ValueError: if there is no such model, it does not run without numbers, or an argument is out of range.

    >>> report = plan("llama:hidden=64,layers=2,heads=4,intermediate=128", 2**30, window=64)
    >>> report.rows[0]["optimizer"], report.rows[0]["batch"], report.rows[0]["fits"]
    ('adam', 64, True)
    """
    if memory < 1:
        raise ValueError(f"memory must be >= 1 byte, got {memory}.")
    for name, value, least in (("batch", batch, 1), ("window", window, 2)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}.")
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve must be >= 0 and < 1, got {reserve}.")
    if not candidates:
        raise ValueError("candidates is empty; give at least one transform by name.")
    config = _config(model)
    numberless = without_numbers()
    with numberless:
        network = _network(config, dtype).train()
        check_head(network, window, "only such models are planned")
        weights = held_bytes(network)
        params = sum(p.numel() for p in network.parameters())
        counts = {name: _Counts.of(network, candidates[name]) for name in track([*candidates], "states")}
    others = step_bytes(adam(), dtype)
    needs = [
        _Need.of(name, counts[name], (step_bytes(transform, dtype, counts[name].side), others))
        for name, transform in candidates.items()
    ]
    room = int(memory * (1 - reserve)) - weights
    ways: list[_Way] = []
    with numberless:
        for savings in track([*product((False, True), repeat=2)], "passes"):
            try:
                ways.append(_Way.of(network, window, autocast, max(MOST, batch), *savings))
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(
                    f"{type(network).__name__} in {dtype} does not run without numbers, so it cannot be planned "
                    f"({reason})."
                ) from error
            if all(any(_largest(need, way, room, batch) >= batch for way in ways) for need in needs):
                break  # more savings would not be taken
    rows = [_row(need, ways, weights, room, batch) for need in needs]
    fitting = [row for row in rows if row["fits"]]
    rows = [*fitting, *sorted((row for row in rows if not row["fits"]), key=lambda row: row["total"])]
    totals = {"memory": memory, "reserve": reserve, "window": window, "params": params, "weights": weights}
    found = f"{len(fitting)} of {len(rows)} optimisers fit into {memory / GIB:.4g} GiB"
    return Report(f"{params / 1e6:,.1f}M parameters in {dtype}, {found}", rows, "plans", totals)


def step_bytes(transform: Transform, dtype: torch.dtype, side: int = SAMPLE[-1]) -> float:
    """Count the bytes a number that a step of matrices holds at most beside gradients and states.

    Args:
        transform: of the matrices.
        dtype: of the matrices.
        side: the shorter one of those that are meant, of which a rank takes the same share here.
    """
    generator, write = Generator().manual_seed(0), usual_write(dtype)
    transform = _of_side(transform, side)

    def peak(matrices: list[nn.Parameter], optimizer: Optimizer) -> int:
        for matrix in matrices:
            matrix.grad = torch.randn(SAMPLE, generator=generator).to(dtype)
        grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
        states = [leaf for state in optimizer.state.values() for leaf in leaves(state)]
        with LiveBytes([*matrices, *grads, *states]) as live:
            optimizer.step()
        return live.peak - live.now

    most, first = 0.0, True
    with torch.random.fork_rng(devices=()):
        for count in (1, 1, 2):  # the first time also makes what is made once for all, and does not count
            matrices = [nn.Parameter(torch.randn(SAMPLE, generator=generator).to(dtype)) for _ in range(count)]
            optimizer = Optimizer([(matrices, transform)], lr=1e-3, write=write)
            held = max(peak(matrices, optimizer) for _ in range(STEPS))
            most, first = (0.0 if first else max(most, held / (count * matrices[0].numel()))), False
    return most


def _of_side(value: Any, side: int) -> Any:
    """Return a transform whose ranks, where they are numbers of directions, are shares of a side instead."""
    if isinstance(value, tuple):
        return tuple(_of_side(each, side) for each in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for name in [field.name for field in dataclasses.fields(value)]:
        part = getattr(value, name)
        is_number = name in ("rank", "above") and isinstance(part, int)
        changed[name] = min(part / side, 1.0) if is_number else _of_side(part, side)
    return dataclasses.replace(value, **changed)


@dataclass(frozen=True)
class _Counts:
    """How many numbers and bytes an optimiser is about.

    Args:
        state: bytes between steps.
        gradients: their bytes.
        groups: for each group whether it is of hidden matrices, whether these are slices of parameters, the
            numbers of the largest parameter, and of what is stepped together.
        side: the shorter side of the largest hidden matrix.
    """

    state: int
    gradients: int
    groups: list[tuple[bool, bool, int, int]]
    side: int

    @classmethod
    def of(cls, model: nn.Module, transform: Transform) -> "_Counts":
        """Count it, without numbers."""
        hidden, state, sizes, sides = hidden_matrices(model), 0, [], {}
        place = torch.zeros(1, dtype=torch.int64)
        for group in parameter_groups(model, transform):
            params = [torch.empty_like(p, device="meta") for _, p in group["params"]]
            kind, inside = group["transform"], group["params"][0][0] in hidden
            rounding = usual_write(params[0].dtype).init(params[0], place)
            state += state_bytes(kind, *params) + len(params) * sum(leaf.nbytes for leaf in leaves(rounding))
            largest = max(params, key=lambda p: p.numel())
            together = min(sum(p.numel() for p in params), STACK // largest.element_size())
            sizes.append((inside, isinstance(kind, Batched), largest.numel(), max(largest.numel(), together)))
            if inside:
                matrix = kind.shaped(largest[None]).shape[-2:]
                sides[math.prod(matrix)] = min(matrix)
        return cls(state, gradient_bytes(model), sizes, sides[max(sides)])


@dataclass(frozen=True)
class _Way:
    """A way to take a forward and backward pass.

    Args:
        layerwise: whether gradients are freed at once.
        checkpointing: whether activations are computed again.
        one: bytes with one sequence.
        top: how many sequences there are at most.
        most: bytes with these.
    """

    layerwise: bool
    checkpointing: bool
    one: int
    top: int
    most: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        window: int,
        autocast: torch.dtype | None,
        top: int,
        layerwise: bool,
        checkpointing: bool,
    ) -> "_Way":
        """Run it without numbers."""
        with recomputing(model, checkpointing):
            one, most = (
                pass_bytes(model, _loss(model, rows, window, autocast), layerwise=layerwise) for rows in (1, top)
            )
        return cls(layerwise, checkpointing, one, top, most)

    def bytes(self, batch: int) -> int:
        """Bytes with so many sequences: at most, since the worst moment grows by a convex function."""
        return self.one + (self.most - self.one) * (batch - 1) // (self.top - 1)


@dataclass(frozen=True)
class _Need:
    """What an optimiser needs.

    Args:
        name: of the candidate.
        state: bytes between steps.
        whole: bytes of a step of all parameters, gradients included.
        single: bytes of a step of one parameter beside its gradient.
    """

    name: str
    state: int
    whole: int
    single: int

    @classmethod
    def of(cls, name: str, counts: _Counts, held: tuple[float, float]) -> "_Need":
        """Put it together; ``held`` is what a step holds for a number of hidden matrices, and of the others."""
        of_hidden, of_others = held
        sizes = [
            ((of_hidden if inside else of_others) + WHOLE * slices, *numbers)
            for inside, slices, *numbers in counts.groups
        ]
        single = max(int(size * largest) for size, largest, _ in sizes)
        whole = max(int(size * together) for size, _, together in sizes)
        return cls(name, counts.state, whole + counts.gradients, single)


def _row(need: _Need, ways: list[_Way], weights: int, room: int, wanted: int) -> dict[str, Any]:
    """Choose the first way in which the batch that is wanted fits, or else the one with the largest batch."""
    largest = [_largest(need, way, room, wanted) for way in ways]
    enough = [i for i, count in enumerate(largest) if count >= wanted]
    i = enough[0] if enough else max(range(len(ways)), key=lambda i: (largest[i], i if not largest[i] else -i))
    way, batch = ways[i], max(largest[i], 1)
    step = need.single if way.layerwise else need.whole
    total = weights + need.state + _moving(need, way, batch)
    sizes = {"weights": weights, "state": need.state, "pass": way.bytes(batch), "step": step, "total": total}
    return {
        "optimizer": need.name,
        "layerwise": way.layerwise,
        "checkpointing": way.checkpointing,
        "batch": batch,
        **{name: size / GIB for name, size in sizes.items()},
        "fits": largest[i] > 0,
    }


def _largest(need: _Need, way: _Way, room: int, wanted: int) -> int:
    """Return the largest batch that fits beside the weights, or zero."""
    left = room - need.state
    return max((batch for batch in _batches(wanted) if _moving(need, way, batch) <= left), default=0)


def _moving(need: _Need, way: _Way, batch: int) -> int:
    """Bytes beside weights and states at the worst moment."""
    passing = way.bytes(batch)
    return passing + need.single if way.layerwise else max(passing, need.whole)


def _batches(wanted: int) -> set[int]:
    """The batches that are tried: the one that is wanted, and powers of two."""
    return {wanted, *(2**i for i in range(MOST.bit_length()))}


def _loss(model: nn.Module, rows: int, window: int, autocast: torch.dtype | None) -> Any:
    ids = torch.zeros(rows, window, dtype=torch.long)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = model(input_ids=ids, use_cache=False)
        return given(output, {"input_ids": ids}, Generator())

    return loss


def _network(config: Any, dtype: torch.dtype) -> Any:
    """Make the model with the attention that training it would take, but without masks if that is fused."""
    usual = fresh(config, dtype=dtype)
    if usual.config._attn_implementation == "sdpa":
        with contextlib.suppress(ValueError):  # of families that know their own kinds of attention alone
            return fresh(config, dtype=dtype, attention=causal_attention())
    return usual


def _config(model: Any) -> Any:
    from transformers import PreTrainedModel

    config = read_config(model) if isinstance(model, (str, Path)) else model
    config = copy.deepcopy(config.config if isinstance(config, PreTrainedModel) else config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the model is compressed or quantised; give the one that it was made of.")
    return config
