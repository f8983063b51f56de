"""The verb that turns gradients into natural gradients before an optimiser steps."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel

from .core.conditioned import Conditioned
from .core.conditioning import Conditioning
from .core.exchange import Traffic
from .core.preconditioner import Preconditioner
from .core.surgery import Where, select
from .core.wrapped import unwrapped


def precondition(
    model: nn.Module,
    method: Preconditioner,
    *,
    where: Where | None = None,
    tables: bool = False,
    kl_clip: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    workers: float = 1.0,
    group: Any = None,
    axis: int = 0,
    synchronise: bool = False,
    seed: int = 0,
) -> Conditioning:
    """Precondition the gradients of a model's matrices by their curvature.

    Linear layers, ``Conv2d`` without groups and with zeros around, and, if wanted, embeddings, each with its
    bias; all other parameters keep their gradients. The loss is a mean over the samples of a step, of which each
    counts the same. With several processes each loss is the mean over the process's own samples, and gradients
    are averaged as ever, by ``DistributedDataParallel``, FSDP2 or an all-reduce; what the method needs to know
    besides is exchanged here. Where processes have other numbers of samples, each sample counts the same in the
    curvature, but not in such an average of means.

    Where a sample's loss is itself a mean over T terms, as that of a sequence over its tokens, its squared
    gradients are some T times smaller than those of the terms, and a damping of 0.1 acts like 0.1 T: next to
    nothing but a division. Say ``handle.step(positions=T)`` then, as :func:`rankwise.train` does.

    Call it after what gives layers new parameters, such as ``fully_shard``, and before or after
    ``DistributedDataParallel``; before the first run where ``torch.compile`` is used, which then breaks its graph
    at each layer. Several runs before one backward pass must not recompute with reentrant checkpoints; and
    checkpoints save no memory of the inputs of layers in steps that look at samples.

    Every backward pass brings samples to the next step, and their inputs stay until then. Where gradients are
    dropped, after an error in the middle of a pass for instance, drop the samples, too: ``handle.discard()``.

    Args:
        model: trains; nothing in it is changed but hooks that :meth:`Conditioning.remove` takes off. It is called
            as a whole, not its parts, and its first tensor has the samples on the first axis; see ``axis``.
        method: such as ``rankwise.preconditioners.HyLo(rank=0.1)``.
        where: leaves a layer out if it is false for (name, module); None leaves out what has a frozen weight, the
            output head that a transformers model names, and 3-D parameters.
        tables: also precondition embeddings that share their weight with no other layer.
        kl_clip: shorten the step so that lr^2 v'(F + damping I)^-1 v, about twice the change of the outputs'
            distribution that the quadratic model predicts, is at most this; needs ``optimizer``.
        optimizer: whose learning rates those are; of a weight and its bias the larger one counts.
        workers: share of the processes that multiply the gradients of one layer and give the result to the
            others (KAISA's gradient workers). One exchanges least at each step, less keeps fewer inverses on each
            process; a share of less than one process is one.
        group: of processes; None means all.
        axis: of the samples in the model's first tensor, and in sequences that layers see; 1 for (T, N, n).
        synchronise: wait for the accelerator around each phase, so that :meth:`Conditioning.traffic` is true.
        seed: of what methods draw.

    Returns:
        a handle, of which each step takes ``loss.backward(); handle.step(); optimizer.step()``.

    Raises:
        TypeError: if ``method`` is none.
        ValueError: if there is no layer, one has a handle already, or an argument is wrong.

    References: Pauloski, Huang, Xu, Chard, Hou, Foster, Zhang, "KAISA: an adaptive second-order optimizer
        framework for deep neural networks", 2021, arXiv 2107.01739 (``workers``, ``kl_clip``).

    >>> from rankwise.preconditioners import Sngd
    >>> net = nn.Linear(3, 1)
    >>> handle = precondition(net, Sngd(damping=0.1))
    >>> net(torch.randn(8, 3)).square().mean().backward()
    >>> handle.step()
    True
    """
    if not isinstance(method, Preconditioner):
        raise TypeError(f"method must be an object from rankwise.preconditioners, got {method!r}.")
    if not 0 < workers <= 1:
        raise ValueError(f"workers must be > 0 and <= 1, got {workers}.")
    if kl_clip is not None and not kl_clip > 0:
        raise ValueError(f"kl_clip must be > 0 or None, got {kl_clip}.")
    if kl_clip is not None and optimizer is None:
        raise ValueError("kl_clip needs the optimizer, whose learning rate it reads.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed must be a whole number, got {seed!r}.")
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise ValueError("DataParallel copies its model in each step; use DistributedDataParallel.")
    model = unwrapped(model)
    sites = select(model, where, tables=tables)
    found = {name: Conditioned.of(site) for name, site in sites.items() if site.part is None}
    layers = {name: layer for name, layer in found.items() if layer is not None}
    if not layers:
        raise ValueError(f"none of the {len(sites)} layers has a weight that trains and is a matrix by itself.")
    return Conditioning(
        model,
        method,
        layers,
        kl_clip=kl_clip,
        optimizer=optimizer,
        workers=workers,
        axis=axis,
        traffic=Traffic(synchronise),
        group=group,
        seed=seed,
    )
