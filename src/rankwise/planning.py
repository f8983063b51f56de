"""The verb that says how a model can be trained in so much memory, before anything is made."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .core.labels import given
from .core.live import LiveBytes, pass_bytes, without_numbers
from .core.memory import gradient_bytes, held_bytes
from .core.modes import recomputing
from .core.optimizer import Optimizer
from .core.report import Report
from .core.states import leaves
from .core.transforms import Transform, state_bytes
from .models.causal import check_causal
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
    "q_galore --set rank=0.25": q_galore(rank=0.25),
    "galore --set rank=0.125": galore(rank=0.125),
    "adafactor": adafactor(),
}
"""Optimisers by the words for ``rankwise train --optimizer``, those that keep most of the gradients first."""

SAMPLE, STEPS = (2, 192, 192), 2  # what a step holds is counted on these; square ones have the largest factors
STACK = 2**26  # bytes of gradients that are stepped together on a GPU
MOST = 64  # sequences at a time
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
    gradients, logits, each as long as it lives, with an attention that makes no mask. What a step holds beside
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
        ValueError: if there is no such model, or an argument is out of range.

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
    others = step_bytes(adam(), dtype)
    held = {name: (step_bytes(transform, dtype), others) for name, transform in candidates.items()}
    with without_numbers():
        network = fresh(config, dtype=dtype, attention=causal_attention()).train()
        check_causal(network, window, "only such models are planned")
        ways = [_Way.of(network, window, autocast, *each) for each in product((False, True), repeat=2)]
        weights = held_bytes(network)
        params = sum(p.numel() for p in network.parameters())
    needs = [_Need.of(name, network, transform, held[name]) for name, transform in candidates.items()]
    room = int(memory * (1 - reserve))
    rows = [_row(need, ways, weights, room, batch) for need in needs]
    fitting = [row for row in rows if row["fits"]]
    rows = [*fitting, *sorted((row for row in rows if not row["fits"]), key=lambda row: row["total"])]
    totals = {"memory": memory, "reserve": reserve, "window": window, "params": params, "weights": weights}
    found = f"{len(fitting)} of {len(rows)} optimisers fit into {memory / GIB:.4g} GiB"
    return Report(f"{params / 1e6:,.1f}M parameters in {dtype}, {found}", rows, "plans", totals)


def step_bytes(transform: Transform, dtype: torch.dtype) -> float:
    """Count the bytes a number that a step of stacked matrices holds at most beside gradients and states."""
    generator = Generator().manual_seed(0)
    matrices = [nn.Parameter(each) for each in torch.randn(SAMPLE, generator=generator).to(dtype)]
    optimizer = Optimizer([(matrices, transform)], lr=1e-3)
    most = 0
    with torch.random.fork_rng(devices=()):
        for _ in range(STEPS):
            grads = torch.randn(SAMPLE, generator=generator).to(dtype)
            for matrix, grad in zip(matrices, grads, strict=True):
                matrix.grad = grad
            states = [leaf for state in optimizer.state.values() for leaf in leaves(state)]
            with LiveBytes([*matrices, grads, *states]) as live:
                optimizer.step()
            most = max(most, live.peak - live.now)
    return most / sum(matrix.numel() for matrix in matrices)


@dataclass(frozen=True)
class _Way:
    """A way to take a forward and backward pass.

    Args:
        layerwise: whether gradients are freed at once.
        checkpointing: whether activations are computed again.
        one: bytes with one sequence.
        most: bytes with MOST sequences.
    """

    layerwise: bool
    checkpointing: bool
    one: int
    most: int

    @classmethod
    def of(
        cls, model: nn.Module, window: int, autocast: torch.dtype | None, layerwise: bool, checkpointing: bool
    ) -> "_Way":
        """Run it without numbers."""
        with recomputing(model, checkpointing):
            sizes = [
                pass_bytes(model, _loss(model, rows, window, autocast), layerwise=layerwise) for rows in (1, MOST)
            ]
        return cls(layerwise, checkpointing, *sizes)

    def bytes(self, batch: int) -> int:
        """Bytes with so many sequences: at most, since the worst moment grows by a convex function."""
        return self.one + (self.most - self.one) * (batch - 1) // (MOST - 1)


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
    def of(cls, name: str, model: nn.Module, transform: Transform, held: Sequence[float]) -> "_Need":
        """Count it; ``held`` is what a step holds for each number of hidden matrices, and of the others."""
        groups = [
            ([torch.empty_like(p, device="meta") for _, p in group["params"]], group["transform"])
            for group in parameter_groups(model, transform)
        ]
        state = sum(state_bytes(kind, *params) for params, kind in groups)
        whole, single = 0, 0
        for i, (params, _) in enumerate(groups):
            largest = max(p.numel() for p in params)
            together = min(sum(p.numel() for p in params), STACK // params[0].element_size())
            each = held[1 if i else 0]
            whole, single = max(whole, int(each * max(largest, together))), max(single, int(each * largest))
        return cls(name, state, whole + gradient_bytes(model), single)


def _row(need: _Need, ways: list[_Way], weights: int, room: int, wanted: int) -> dict[str, Any]:
    """Choose the first way in which the batch that is wanted fits, or else the one with the largest batch."""
    left = room - weights - need.state
    largest = [max((b for b in _batches() if _moving(need, way, b) <= left), default=0) for way in ways]
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


def _moving(need: _Need, way: _Way, batch: int) -> int:
    """Bytes beside weights and states at the worst moment."""
    passing = way.bytes(batch)
    return passing + need.single if way.layerwise else max(passing, need.whole)


def _batches() -> Iterator[int]:
    count = 1
    while count <= MOST:
        yield count
        count *= 2


def _loss(model: nn.Module, rows: int, window: int, autocast: torch.dtype | None) -> Any:
    ids = torch.zeros(rows, window, dtype=torch.long)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = model(input_ids=ids, use_cache=False)
        return given(output, {"input_ids": ids}, Generator())

    return loss


def _config(model: Any) -> Any:
    from transformers import PreTrainedModel

    config = read_config(model) if isinstance(model, (str, Path)) else model
    config = copy.deepcopy(config.config if isinstance(config, PreTrainedModel) else config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the model is compressed or quantised; give the one that it was made of.")
    return config
