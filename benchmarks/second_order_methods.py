"""The methods that second_order.py trains and curvature_cost.py times, kfac-pytorch among them."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

import rankwise
from rankwise.core.exchange import Traffic
from rankwise.core.preconditioner import Preconditioner, damping_at
from rankwise.linalg import reduced
from rankwise.preconditioners import Ekfac, HyLo, Kfac, MFac, Sngd

RANK, CLIP = 0.1, 0.01  # share of the samples that HyLo keeps; see Ours

Phases = dict[str, dict[str, float]]


class Handle:
    """Turns gradients into directions; this one leaves them as they are."""

    def step(self, positions: int = 1) -> None:
        """Turn the gradients that a model has, of losses that are means over as many positions."""

    def phases(self) -> Phases:
        """Return bytes, seconds and times of each phase so far."""
        return {}

    def state(self) -> int:
        """Return the bytes that are kept."""
        return 0

    def remove(self) -> None:
        """Take the hooks off the model."""


class Ours(Handle):
    """A method of rankwise.preconditioners.

    The predicted change of a step is kept below CLIP times the square of learning rate / damping, which is how
    far a gradient goes where there is no curvature, so that steps are as long as the rate says whether they are
    shortened or not.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: Preconditioner) -> None:
        self.optimizer, self.method = optimizer, method
        self.handle = rankwise.precondition(model, method, optimizer=optimizer, kl_clip=CLIP, synchronise=True)

    def step(self, positions: int = 1) -> None:
        damping = damping_at(self.method.damping, self.handle.steps)
        self.handle.kl_clip = CLIP * (self.optimizer.param_groups[0]["lr"] / damping) ** 2
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "a gradient is not finite")
            try:
                self.handle.step(positions=positions)
            except RuntimeWarning as warning:
                raise FloatingPointError(str(warning)) from None

    def phases(self) -> Phases:
        return self.handle.traffic()

    def remove(self) -> None:
        self.handle.remove()

    def state(self) -> int:
        return held(t for tensors in self.handle.curvature.values() for t in tensors.values())


class Theirs(Handle):
    """kfac-pytorch, with its seconds and bytes counted from outside.

    Its clip is the usual one at the usual rate 0.1, and goes with the square of the rate as in :class:`Ours`; the
    rate would else have no effect where steps are shortened, which is nearly always.
    """

    PHASES: ClassVar = {
        "factorise": ("save_layer_input", "save_layer_grad_output", "update_a_factor", "update_g_factor"),
        "invert": ("compute_a_inv", "compute_g_inv"),
        "apply": ("preconditioned_grad", "update_grad"),
    }
    SENT: ClassVar = {
        "exchange": ("allreduce", "allreduce_bucketed"),
        "broadcast": ("broadcast",),
    }

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, damping: float, every: int, factors_every: int = 1
    ) -> None:
        rival = imported("kfac.preconditioner")
        # the input of a model's first layer has no gradient
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        group = optimizer.param_groups[0]
        self.kfac = rival.KFACPreconditioner(
            model,
            damping=damping,
            lr=lambda step: group["lr"],
            kl_clip=lambda step: 0.001 * (group["lr"] / 0.1) ** 2,
            factor_update_steps=factors_every,
            inv_update_steps=every,
            factor_decay=0.95,
        )
        self.traffic = Traffic(synchronise=True)
        for _, layer in self.kfac._layers.values():
            for phase, names in self.PHASES.items():
                for name in names:
                    setattr(layer, name, self._timed(phase, getattr(layer, name)))
        for phase, names in self.SENT.items():
            for name in names:
                setattr(self.kfac._tdc, name, self._counted(phase, getattr(self.kfac._tdc, name)))

    def step(self, positions: int = 1) -> None:
        self.kfac.step()

    def phases(self) -> Phases:
        return self.traffic.table()

    def remove(self) -> None:
        for module in self.kfac._layers:
            module._forward_pre_hooks.clear()
            module._backward_hooks.clear()

    def state(self) -> int:
        return self.kfac.memory_usage()["total"]

    def _timed(self, phase: str, function: Callable) -> Callable:
        def timed(*args: Any, **options: Any) -> Any:
            with self.traffic.phase(phase):
                return function(*args, **options)

        return timed

    def _counted(self, phase: str, function: Callable) -> Callable:
        def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            if dist.is_initialized():
                self.traffic.count(phase, tensor)
            with self.traffic.phase(phase):
                return function(tensor, *args, **options)

        return counted


def imported(name: str) -> Any:
    """Import a module of kfac-pytorch, which warns that apex is not there."""
    if importlib.util.find_spec("kfac") is None:
        raise SystemExit("pip install --no-deps kfac-pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def sgd(params: list[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adamw(params: list[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def nothing(model: nn.Module, optimizer: Optimizer, damping: float, every: int) -> Handle:
    return Handle()


@dataclass(frozen=True)
class Entry:
    """A method.

    Args:
        usual: decimal logarithms of a usual learning rate and, where there is one, damping.
        attach: makes its handle for a model, the layers' optimiser, a damping and a period.
        optimizer: of the layers.
        relative: the learning rate is given as a multiple of the damping, which is how far a gradient goes where
            there is no curvature; else a smaller damping would need a smaller rate each time.
    """

    usual: tuple[float, ...]
    attach: Callable[[nn.Module, Optimizer, float, int], Handle] = nothing
    optimizer: Callable[[list[nn.Parameter], float], Optimizer] = sgd
    relative: bool = False

    def rate(self, place: tuple[float, ...]) -> float:
        """Return the learning rate."""
        return 10 ** sum(place) if self.relative else 10 ** place[0]


def damped(make: Callable[[float, int], Preconditioner], usual: tuple[float, float] = (0.0, -1.0)) -> Entry:
    """Return the entry of a method of ours that is made of a damping and a period."""
    return Entry(
        usual,
        lambda model, optimizer, damping, every: Ours(model, optimizer, make(damping, every)),
        relative=True,
    )


def hylo(mode: str) -> Entry:
    """Return the entry of HyLo that keeps a tenth of the samples; a window is five looks."""
    return damped(
        lambda damping, every: HyLo(rank=RANK, damping=damping, every=every, mode=mode, window=5 * every)
    )


def seldom(model: nn.Module, optimizer: Optimizer, damping: float, every: int) -> Handle:
    """Return kfac-pytorch's handle with factors renewed only where they are inverted."""
    return Theirs(model, optimizer, damping, every, factors_every=every)


METHODS = {
    "AdamW": Entry((-2.5,), optimizer=adamw),
    "SGD, momentum": Entry((-1.0,)),
    "kfac-pytorch": Entry((-1.0, -2.5), Theirs),
    "kfac-pytorch, seldom": Entry((-1.0, -2.5), seldom),
    "K-FAC": damped(lambda damping, every: Kfac(damping=damping, every=every)),
    "K-FAC, seldom": damped(lambda damping, every: Kfac(damping=damping, every=every, factors_every=every)),
    "K-FAC, reduced, seldom": damped(
        lambda damping, every: Kfac(damping=damping, every=every, factors_every=every, sharing=reduced)
    ),
    "EK-FAC": damped(lambda damping, every: Ekfac(damping=damping, every=every)),
    "SNGD": damped(lambda damping, every: Sngd(damping=damping, every=every, sharing=reduced)),
    "HyLo, KID": hylo("kid"),
    "HyLo, KIS": hylo("kis"),
    "HyLo, auto": hylo("auto"),
    "M-FAC": damped(lambda damping, every: MFac(damping=damping, gradients=64), usual=(-0.5, -3.0)),
}


def held(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
