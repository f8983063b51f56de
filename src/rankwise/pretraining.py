"""The verb that trains all numbers of a model, from scratch or further, with little memory."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .core.adapted import refuse_adapted
from .core.conditioning import Conditioning
from .core.data import batches_of, check_held_out, digest_of_batches, parted
from .core.fingerprint import fingerprint
from .core.hidden import Form, biases_of_stacks, hidden_matrices
from .core.labels import Labels, given
from .core.memory import layerwise_gradient_bytes
from .core.modes import recomputing
from .core.optimizer import Optimizer
from .core.parts import is_sharded
from .core.plan import Plan, between_looks
from .core.processes import compare, leads, several
from .core.rates import Cosine
from .core.replicated import Shared
from .core.report import Report
from .core.running import Observe
from .core.statistics import Batch
from .core.stepping import Layerwise
from .core.stored import Batched, Transposed, batched, transposed
from .core.supervision import train_supervised
from .core.transforms import Transform
from .models.causal import check_tokens
from .models.labelled import are_ahead, check_decoder, placed
from .optimizers import adam

MOST_ASIDE = 64  # batches that are judged by: each look runs them all


def parameter_groups(
    model: nn.Module,
    transform: Transform,
    *,
    other: Transform = adam(),  # noqa: B008 (frozen)
    lr: float | None = None,
    other_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Give hidden matrices one transform and all else another, as the papers of matrix optimisers do.

    Hidden matrices are what linear layers and convolutions multiply with: attention and MLP matrices. Embeddings,
    the output head, norms and biases are the others; see :func:`rankwise.core.hidden.hidden_matrices`. Stacked
    experts step as the matrices that they are (``batched``), and what is stored as (in, out) as (out, in)
    (``transposed``). Norms, biases and other vectors do not decay.

    Args:
        model: any module.
        transform: of hidden matrices, such as ``galore(rank=128)`` or ``muon()``.
        other: of all other parameters that train.
        lr: of hidden matrices; None leaves it to the optimiser.
        other_lr: of the others; None means ``lr``.
        weight_decay: of hidden matrices, embeddings and heads.

    Returns:
        groups for :class:`rankwise.Optimizer`: hidden matrices, one group for each form in which they are kept,
        then other matrices, then vectors.

    Raises:
        ValueError: if there is no hidden matrix, or the transform says already how matrices are kept.

    >>> from rankwise.optimizers import muon
    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> groups = parameter_groups(net, muon(), lr=0.02, other_lr=1e-3)
    >>> [[name for name, _ in group["params"]] for group in groups]
    [['1.weight'], ['0.weight'], ['1.bias', '2.weight', '2.bias']]
    """
    if isinstance(transform, Batched | Transposed):
        raise ValueError("how matrices are kept is found out here; give it without batched or transposed.")
    forms = hidden_matrices(model)
    every = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p for name, p in every.items() if name not in forms}
    biases = biases_of_stacks(model)
    tables = {name: p for name, p in rest.items() if p.ndim >= 2 and name not in biases}
    vectors = {name: p for name, p in rest.items() if p.ndim < 2 or name in biases}
    rates = [lr, lr if other_lr is None else other_lr]
    first, second = ({} if rate is None else {"lr": rate} for rate in rates)
    kept = [
        ([(name, every[name]) for name, own in forms.items() if own == form], _of_form(transform, form))
        for form in dict.fromkeys(forms.values())
    ]
    groups: list[dict[str, Any]] = [
        *({"params": own, "transform": kind, "weight_decay": weight_decay, **first} for own, kind in kept),
        {"params": list(tables.items()), "transform": other, "weight_decay": weight_decay, **second},
        {"params": list(vectors.items()), "transform": other, "weight_decay": 0.0, **second},
    ]
    return [group for group in groups if group["params"]]


def _of_form(transform: Transform, form: Form) -> Transform:
    """The transform of matrices (out, in) for parameters that keep them in another form."""
    transform = transposed(transform) if form.transposed else transform
    return batched(transform) if form.batched else transform


def train(
    model: nn.Module,
    data: Tensor | Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    held_out: float | Sequence[Batch] = 0.05,
    loss: Labels = given,
    steps: int | None = None,
    accumulate: int = 1,
    rate: Callable[[float], float] | None = None,
    clip: float | None = None,
    every: int | None = None,
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    layerwise: bool = False,
    precondition: Conditioning | None = None,
    checkpoint: str | Path | None = None,
    notify: Callable[[Mapping[str, int | None]], None] | None = None,
    observe: Observe | None = None,
    window: int = 512,
    rows: int = 4,
    seed: int = 0,
) -> Report:
    """Train a model, from scratch or further, in place, without a second copy of its numbers.

    Where there are several processes (``torch.distributed``), each calls this with the same arguments and
    computes a share of the ``accumulate`` batches of each step, of which there must be one for each process. They
    exchange projected gradients in place of whole ones, unless there is a ``clip`` or ``precondition``; see
    :class:`rankwise.Replicated`. The steps are those of one process. The first writes checkpoints, which any such
    number of processes may take up, but with dropout not bit by bit.

    The last numbers remain, also after an interrupt or an error. Parameters in half precision stay so: their
    steps are computed in float32 and then rounded, so that small ones are lost unless the optimiser's ``write``
    rounds in another way.

    Args:
        model: any module; :func:`rankwise.models.fresh` makes a language model from a config.
        data: token ids (t,), to be cut into windows, or batches as :func:`finetune` takes them.
        optimizer: over what trains, for instance
            ``Optimizer(parameter_groups(model, galore(rank=128)), lr=0.01)``; its learning rates are the largest.
        held_out: share of the batches kept aside to judge by, in (0, 1), 64 batches at most; or other batches.
        loss: as for :func:`finetune`.
        steps: how many; None means one pass over the data.
        accumulate: batches of a step; each label of a step counts the same.
        rate: share of the learning rate where a share of the run is done; None means a tenth of the run up, then
            half a cosine down, :class:`rankwise.core.rates.Cosine`.
        clip: largest 2-norm of the gradient of all parameters, or None.
        every: steps between two looks at what judges, each followed by a checkpoint; None means at most ten.
        autocast: run the model in this type.
        gradient_checkpointing: compute activations again instead of keeping them; transformers' models only.
        layerwise: step each parameter inside the backward pass and free its gradient, see
            :class:`rankwise.Layerwise`; with ``clip`` each step takes two passes.
        precondition: a handle from ``rankwise.precondition(model, ...)``, which makes natural gradients before
            they are clipped. A sample is what is on the first axis of a batch: of a language model a sequence,
            with its tokens as positions, and its curvature that of tokens: ``positions`` of each step is the
            labels of a sample in the mean over the step, so that damping is in units of tokens. The
            predicted memory includes what it at least holds; what it took is in ``totals["precondition"]`` of the
            report.
        checkpoint: a folder; the same call, with the model as it was at the start, goes on from what is there,
            bit by bit.
        notify: is called with the predicted memory before the first step.
        observe: is called with the number of steps and figures: ``train`` and ``lr`` after each step,
            ``held_out`` at each look.
        window: length of the sequences that ids are cut into.
        rows: sequences of a batch that ids are cut into.
        seed: of the order of the data, what is kept aside, and dropout.

    Returns:
        as :func:`finetune`; ``held_out`` after the run is that of the last look.

    Raises:
        ValueError: if an argument is wrong, nothing trains, the optimiser lacks a parameter that asks for
            gradients, numbers are not finite, or the checkpoint is of another task or damaged.
        CalibrationError: if the data is empty.

    >>> from rankwise.optimizers import galore
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16))
    >>> optimizer = Optimizer(parameter_groups(net, galore(rank=2, every=10)), lr=0.1)
    >>> report = train(net, torch.arange(2000) % 16, optimizer, window=20, steps=40, layerwise=True)
    >>> report.totals["held_out"]["after"] < 0.5 * report.totals["held_out"]["before"]
    True
    """
    refuse_adapted(model)
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "parameters are sharded, as by fully_shard, which train does not know; give the model as it was, or "
            "write the loop: loss.backward(), optimizer.step(), optimizer.zero_grad()."
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if lost := next((name for name, p in trained.items() if id(p) not in owned), None):
        raise ValueError(f"the optimizer lacks {lost}, which asks for gradients; see parameter_groups.")
    for name, value, least in (("accumulate", accumulate, 1), ("window", window, 2), ("rows", rows, 1)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}.")
    check_held_out(held_out)
    _check_handle(model, precondition, layerwise)
    batches = batches_of(data, window=window, tokens=window * rows)
    if isinstance(data, Tensor) and "use_cache" in inspect.signature(model.forward).parameters:
        batches = [{"input_ids": batch, "use_cache": False} for batch in batches]
    check_tokens(model, [*batches, *(held_out if isinstance(held_out, Sequence) else ())])
    if isinstance(held_out, Sequence):
        judges = [*held_out]
    else:
        batches, judges = parted(batches, held_out, seed, most=MOST_ASIDE)
    check_decoder(model, [*batches, *judges])
    steps = math.ceil(len(batches) / accumulate) if steps is None else steps
    plan = Plan(
        seconds=math.inf,
        steps=steps,
        pieces=accumulate,
        every=between_looks(steps) if every is None else every,
        patience=None,
        seed=seed,
        rate=rate or Cosine(0.1),
        clip=clip,
        autocast=autocast,
        spare=False,
    )
    layers = _layers(optimizer, accumulate, clip) if layerwise else None
    together = several() and layers is None
    if together:
        _check_shares(accumulate)
        compare([digest_of_batches(part) for part in (batches, judges)], "data")
        compare(fingerprint(model), "models")
    shared = _shared(optimizer, clip) if together and precondition is None else None
    try:
        with recomputing(model, gradient_checkpointing):
            run, reason, memory = train_supervised(
                model,
                trained,
                optimizer,
                plan,
                batches,
                judges,
                loss=placed(loss, model, [*batches, *judges]),
                ahead=are_ahead(model),
                checkpoint=checkpoint,
                writes=leads() or not together,
                notify=notify,
                observe=observe,
                looking=_wait if together else None,
                stepping=layers or shared,
                conditioning=precondition,
                together=together and shared is None,
                gradients=layerwise_gradient_bytes(model) if layerwise and accumulate == 1 else None,
            )
    finally:
        if layers is not None:
            layers.remove()
        if shared is not None:
            shared.replicas.remove()
    totals = {"optimizer": type(optimizer).__name__, **run.summary(), "stopped": reason, "memory": dict(memory)}
    if precondition is not None:
        totals["precondition"] = precondition.summary()
    held = totals["held_out"]
    change = f"held-out loss {held['before']:.4f} -> {held['after']:.4f} nats a token"
    return Report(
        f"{change} in {run.progress.step} steps, {run.progress.rows:,} tokens; {reason}",
        run.progress.history,
        "looks",
        totals,
    )


def _shared(optimizer: torch.optim.Optimizer, clip: float | None) -> Shared:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"several processes need a rankwise.Optimizer, got a {type(optimizer).__name__}.")
    return Shared(optimizer, clip)


def _check_shares(accumulate: int) -> None:
    """Raise unless each of several processes has something to do."""
    if accumulate < dist.get_world_size():
        raise ValueError(
            f"{dist.get_world_size()} processes share the batches of a step, but there are {accumulate}, so that "
            "some would do nothing; for accumulate take a multiple of the processes, perhaps of smaller batches."
        )


def _wait() -> None:
    """Wait for all processes: the first must not write a checkpoint while others look for an earlier one."""
    dist.barrier()


def _check_handle(model: nn.Module, handle: Conditioning | None, layerwise: bool) -> None:
    """Raise unless a handle can step before the optimiser."""
    if handle is None:
        return
    if layerwise:
        raise ValueError(
            "layer by layer each gradient is used up and freed before natural gradients can be made of all; "
            "leave out layerwise or precondition."
        )
    if several() and handle.exchange.size != dist.get_world_size():
        raise ValueError(
            f"the handle of precondition knows {handle.exchange.size} of {dist.get_world_size()} processes; make "
            "it after torch.distributed.init_process_group, for all of them."
        )
    handle.about()  # what it cannot say is to fail here, not after all steps
    if not any(each is handle.model for each in model.modules()):
        raise ValueError("precondition is the handle of another model; give rankwise.precondition(model, ...).")


def _layers(optimizer: torch.optim.Optimizer, accumulate: int, clip: float | None) -> Layerwise:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"layerwise needs a rankwise.Optimizer, got a {type(optimizer).__name__}.")
    return Layerwise(optimizer, accumulate=accumulate, clip=clip)
