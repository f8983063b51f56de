"""Data parallelism in which processes exchange what steps need of gradients, not the gradients."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fingerprint import digest_of
from .optimizer import Optimizer
from .parts import energy, is_sharded
from .processes import compare
from .states import State
from .stepping import Loss

BUCKET = 25 * 2**20  # bytes that are exchanged at once, as in torch's DistributedDataParallel


class Replicated:
    """Averages gradients over processes that train copies of one model, in reduced form where that is enough.

    It takes the place of ``DistributedDataParallel``: each process has the whole model and the whole state, and
    batches of its own; the loop stays as it is. In ``optimizer.step()`` each process projects its own gradient,
    the projected ones are averaged, and all take the step of the joint batch. Averages of projections are
    projections of averages (see :meth:`rankwise.core.transforms.Transform.reduce`), so nothing is lost. Whole
    gradients are exchanged of parameters that are not projected, of projections with a rest (FRUGAL, Fira,
    feedback), and where a basis is due. Gradients of half precision are exchanged in that, as torch does.

    Backward passes before a step add up in each process and are exchanged once. After a step, gradients that
    were projected are gone, and ``zero_grad`` drops the others. A parameter without a gradient in some processes
    has a zero one there. Where a gradient is not finite in any process, the step raises in all of them.

    Do not clip gradients outside: those of one process are not the joint ones. With ``clip`` the joint ones are,
    for which all are exchanged whole. A ``GradScaler`` is refused, since it skips steps in one process alone, and
    ``optimizer.step_one`` exchanges nothing. Learning rates, weight decays and what is frozen are compared at
    each step, by a message of 40 bytes. Buffers, such as running means, and frozen parameters are left alone;
    make models alike. Losses are means over equally large batches. A state may be loaded with any number of
    processes, by all of them.

    Args:
        optimizer: the same in all processes; its parameters become those of the first process.
        clip: largest 2-norm of the joint gradient of all parameters, or None.
        group: of processes; None is all.

    Raises:
        TypeError: if it is no :class:`rankwise.Optimizer`.
        ValueError: if processes have other parameters, transforms or states, or parameters are sharded.

    >>> from rankwise.optimizers import galore
    >>> import tempfile
    >>> file = f"file://{tempfile.mkdtemp()}/meeting"
    >>> dist.init_process_group("gloo", init_method=file, rank=0, world_size=1)  # torchrun starts more
    >>> model = torch.nn.Linear(64, 32, bias=False)
    >>> optimizer = Optimizer([(model.parameters(), galore(rank=4))], lr=0.01)
    >>> replicas = Replicated(optimizer)
    >>> for _ in range(2):
    ...     model(torch.ones(64)).square().sum().backward()
    ...     optimizer.step()
    >>> replicas.traffic()  # 4 x 64 numbers and a flag; the first step, 32 x 64
    {'last': 1028, 'total': 9224, 'whole': 8192}
    >>> dist.destroy_process_group()
    """

    def __init__(
        self, optimizer: Optimizer, *, clip: float | None = None, group: "dist.ProcessGroup | None" = None
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive or None, got {clip}.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"replicas need a rankwise.Optimizer, got a {type(optimizer).__name__}.")
        if not dist.is_initialized():
            raise ValueError("there are no processes yet; call torch.distributed.init_process_group first.")
        self.optimizer, self.clip, self.group = optimizer, clip, group
        if any(map(is_sharded, self._all())):
            raise ValueError("parameters are sharded already, and the optimiser steps them itself.")
        self._last = self._total = 0
        self._parameters: list[Tensor] = []
        self._alike = False
        self._begin()
        vars(optimizer)["_step_supports_amp_scaling"] = (
            True  # so that a GradScaler calls it, and is refused, in all
        )
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._before_step(args[1:], kwargs)),
            optimizer.register_load_state_dict_post_hook(lambda _: self._forget()),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let the optimiser step alone again."""
        for hook in self._hooks:
            hook.remove()
        vars(self.optimizer).pop("_step_supports_amp_scaling", None)

    def traffic(self) -> dict[str, int]:
        """Count bytes that each process has given to be averaged.

        A ring of P processes sends 2 (P - 1) / P times as many from each.

        Returns:
            ``last``, those of the last step, ``total``, of all steps, and ``whole``, of all gradients once.
        """
        whole = sum(p.nbytes for p in self._parameters)
        return {"last": self._last, "total": self._total, "whole": whole}

    @property
    def device(self) -> torch.device:
        """Where gradients are."""
        return self._all()[0].device

    def _all(self) -> list[Tensor]:
        """All parameters, frozen ones too."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _forget(self) -> None:
        self._alike = False

    def _begin(self) -> None:
        """Have all processes begin with the parameters of the first."""
        parameters = [p for p in self._all() if p.requires_grad]
        compare([(tuple(p.shape), str(p.dtype)) for p in parameters], "parameters", self.group)
        read = self.optimizer.write.read
        elsewhere = {p: digest_of({"": value}) for p in parameters if (value := read([p])[0]) is not p}
        compare(list(elsewhere.values()), "integers for weights", self.group)
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        for p in parameters:
            if p not in elsewhere:
                sent = p.detach().clone(memory_format=torch.contiguous_format)  # strides are each process's own
                dist.broadcast(sent, first, group=self.group)
                p.detach().copy_(sent)
        self._parameters, self._alike = parameters, False

    def _before_step(self, args: Any, kwargs: dict[str, Any]) -> None:
        if any(each is not None for each in (*args, *kwargs.values())):
            raise ValueError("with replicas, compute gradients before the step, not in a closure.")
        with torch.no_grad():
            self._agree()
            present = [p for p in self._all() if p.requires_grad]
            if [*map(id, present)] != [*map(id, self._parameters)]:
                self._begin()
            if not self._alike:
                compare(_description(self.optimizer), "optimisers or states", self.group)
                self._alike = True
            self._exchange()

    def _agree(self) -> None:
        """Compare what may change from step to step, in one small message; what it finds is found by all."""
        scaled = bool({"grad_scale", "found_inf"} & vars(self.optimizer).keys())
        for name in ("grad_scale", "found_inf"):
            vars(self.optimizer).pop(name, None)
        mine = _number(self.optimizer)
        sparse = any(p.grad is not None and p.grad.is_sparse for p in self._all())
        votes = torch.tensor(
            [mine, -mine, sparse, scaled, not self._alike], dtype=torch.int64, device=self.device
        )
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        largest, smallest, *found = votes.tolist()
        if largest != -smallest:
            raise ValueError(
                "processes have different learning rates, weight decays or frozen parameters; "
                "set the same in all of them."
            )
        if found[0]:
            raise ValueError("gradients are sparse; build the embedding with sparse=False.")
        if found[1]:
            raise ValueError(
                "a GradScaler decides in each process alone whether to step, but replicas step together; "
                "train in bfloat16 or float32 without one."
            )
        self._alike = not found[2]

    def _exchange(self) -> None:
        """Average all gradients; step those that are reduced, and leave the others to the optimiser."""
        flags: list[float] = []
        low: dict[Tensor, Tensor] = {}
        self._last, world = 0, dist.get_world_size(self.group)
        for bucket in self._buckets():
            flat = torch.cat(
                [part for each in bucket for part in (each.flag, each.value.flatten().to(each.flag))]
            )
            dist.all_reduce(flat, group=self.group)
            self._last += flat.nbytes
            parts = flat.split([size for each in bucket for size in (1, each.value.numel())])
            flags += torch.cat(parts[::2]).tolist()
            if not bool(flat.isfinite().all()):  # the same numbers in all processes, so all of them raise
                raise self._not_finite(bucket, parts)
            for each, part in zip(bucket, parts[1::2], strict=True):
                mean = part.view(each.value.shape).to(each.value.dtype) / world
                if each.reduced:
                    low[each.param] = mean
                else:
                    each.param.grad = mean
        self._total += self._last
        self._finish(flags, low)

    def _not_finite(self, bucket: list["_Part"], parts: Sequence[Tensor]) -> FloatingPointError:
        """Name the first parameter of which something is not finite."""
        pairs = zip(bucket, parts[::2], parts[1::2], strict=True)
        param = next(each.param for each, *both in pairs if not all(bool(x.isfinite().all()) for x in both))
        return FloatingPointError(
            f"the gradient of {self.optimizer.name_of(param)} is not finite in a process, or their sum is not; "
            "nothing was changed. Skip this step in all processes (zero_grad and go on), or lower lr."
        )

    def _finish(self, flags: list[float], low: dict[Tensor, Tensor]) -> None:
        """Step what was reduced, and leave the rest to the optimiser."""
        for param, flag in zip(self._parameters, flags, strict=True):
            if not flag:
                param.grad = None
            elif param in low:
                self.optimizer.step_one(param, low[param])
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.clip)

    def _buckets(self) -> Iterator[list["_Part"]]:
        """Yield what is exchanged together: neighbours of one type and device, up to a size."""
        bucket: list[_Part] = []
        room = BUCKET
        for param in self._parameters:
            part = self._part(param)
            kind = part.flag.dtype, part.flag.device
            if bucket and (room < part.value.nbytes or kind != (bucket[0].flag.dtype, bucket[0].flag.device)):
                yield bucket
                bucket, room = [], BUCKET
            bucket.append(part)
            room -= part.value.nbytes
        if bucket:
            yield bucket

    def _part(self, param: Tensor) -> "_Part":
        """Take the gradient of a parameter, in reduced form if its next step needs no more."""
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        flag = (
            torch.where(energy(grad).isfinite(), float(param.grad is not None), torch.nan).to(grad.dtype).view(1)
        )
        param.grad = grad
        low = self.optimizer.reduce_one(param, check=False) if self.clip is None else None
        param.grad = None
        return _Part(param, flag, grad if low is None else low, low is not None)


class Shared:
    """Takes steps of which each process computes a share of the losses; see :class:`Stepping`.

    The steps are those that one process would take of all the losses.

    Args:
        optimizer: over the parameters, the same in all processes.
        clip: largest 2-norm of the gradient of all parameters, or None.
    """

    def __init__(self, optimizer: Optimizer, clip: float | None = None) -> None:
        self.optimizer, self.replicas = optimizer, Replicated(optimizer, clip=clip)

    def take(self, losses: Sequence[Loss]) -> tuple[float, bool]:
        """Take one step; each process calls it with all losses."""
        self.optimizer.zero_grad()
        world, device = dist.get_world_size(), self.replicas.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for compute in losses[dist.get_rank() :: world]:
            with torch.enable_grad():  # callers may have turned gradients off
                loss = compute()
            (loss * world).backward()  # gradients are averaged, losses are summed
            total += loss.detach()
        dist.all_reduce(total)
        if not bool(total.isfinite()):
            return float(total), False
        try:
            self.optimizer.step()
        except FloatingPointError:
            return float(total), False
        return float(total), True


class _Part(NamedTuple):
    """What a process gives of a parameter; the flag, in the type to exchange, is 1, 0 (no gradient) or NaN."""

    param: Tensor
    flag: Tensor
    value: Tensor
    reduced: bool


def _description(optimizer: Optimizer) -> list[Any]:
    """Return all that the next step follows from, beside parameters and gradients."""
    state = optimizer.state_dict()
    return [
        state["param_groups"],
        {number: digest_of(_flat(each)) for number, each in state["state"].items()},
        type(optimizer.write).__name__,
        {name: value for name, value in vars(optimizer.write).items() if isinstance(value, (int, float, str))},
    ]


def _number(optimizer: Optimizer) -> int:
    """Return a number of 60 bits for what callers may set between steps."""
    rates = [(float(group["lr"]), float(group["weight_decay"])) for group in optimizer.param_groups]
    frozen = [[not p.requires_grad for p in group["params"]] for group in optimizer.param_groups]
    return int(hashlib.sha256(repr((rates, frozen)).encode()).hexdigest()[:15], 16)


def _flat(state: State, path: str = "") -> dict[str, Tensor]:
    """Return the tensors of a state by their paths."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: value}
    return found
