"""From losses to a step: all gradients at once, or each parameter as soon as its gradient is complete."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from .conditioning import Conditioning
from .exchange import Exchange, Traffic
from .optimizer import Optimizer
from .parts import energy
from .processes import several

Loss = Callable[[], Tensor]


class NothingChanged(FloatingPointError):
    """A loss, or the norm of gradients, is not finite; parameters and states are as they were."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss ({loss}) or a gradient is not finite; nothing was changed.")
        self.loss = loss


class Stepping(Protocol):
    """Takes one step."""

    def take(self, losses: Sequence[Loss]) -> tuple[float, bool]:
        """Lower a sum of losses, each computed when it is called.

        Returns:
            the sum, and whether the step was taken: it is not where a number, or a sum of squares, is not finite.
        """
        ...


class Whole:
    """Collects the gradients of all parameters, then steps.

    Args:
        optimizer: over the parameters.
        clip: largest 2-norm of the gradient of all parameters, or None.
        conditioning: makes natural gradients of them first, which are then clipped.
        together: whether each process computes a share of the losses; their gradients are added up.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        conditioning: Conditioning | None = None,
        *,
        together: bool = False,
    ) -> None:
        self.optimizer, self.clip, self.conditioning = optimizer, clip, conditioning
        self.terms = 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.exchange = Exchange(Traffic(), device=self.parameters[0].device, alone=not together)

    def note(self, terms: int) -> None:
        """Be told by a loss, when it is computed, over how many terms it is summed."""
        self.terms += terms

    def take(self, losses: Sequence[Loss]) -> tuple[float, bool]:
        """Take one step; see :class:`Stepping`. If losses tell their terms, their sum is a mean over them."""
        self.optimizer.zero_grad()
        self.terms = 0
        if self.conditioning is not None:
            self.conditioning.discard()  # of a step that was interrupted
        total = 0.0
        for compute in losses[self.exchange.rank :: self.exchange.size]:
            with torch.enable_grad():  # callers may have turned gradients off
                loss = compute()
            loss.backward()
            total += float(loss.detach())
        own = 0 if self.conditioning is None else self.conditioning.samples()
        total, terms, samples = self._together(total, own)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not all(bool(energy(g).isfinite()) for g in gradients) or not torch.tensor(total).isfinite():
            if self.conditioning is not None:
                self.conditioning.skip()
            return total, False
        if self.conditioning is not None:
            positions = terms / samples if terms and samples else 1.0
            if not self.conditioning.step(scale=own / samples if own else 1.0, positions=positions):
                return total, False
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return total, True

    def _together(self, total: float, samples: int) -> tuple[float, float, float]:
        """Add up gradients, and return the sum of losses, terms and samples, of all processes."""
        if self.exchange.size == 1:
            return total, self.terms, samples
        numbers = [total, self.terms, samples, *(p.grad is not None for p in self.parameters)]
        told = self.exchange.add("numbers", {"": torch.tensor(numbers, dtype=torch.float64)})[""].tolist()
        for p, there in zip(self.parameters, told[3:], strict=True):
            if there:
                p.grad = self.exchange.add("gradients", {"": torch.zeros_like(p) if p.grad is None else p.grad})[
                    ""
                ]
        return told[0], told[1], told[2]


class Layerwise:
    """Steps each parameter inside the backward pass, as soon as its gradient is complete, and frees that.

    So there is about one gradient at a time instead of all of them. The usual loop stays as it is, and schedulers
    of the learning rate work: what is left for ``optimizer.step()`` is to end the step. It must be called, since
    only then may the next gradients come.

    With ``accumulate``, sums of several backward passes are kept where a transform reduces gradients (see
    :meth:`rankwise.core.transforms.Transform.reduce`), as projections do, and then only the projected gradients
    are; all other gradients are added up whole. A step whose basis is due needs the whole gradient of that
    matrix; the first step needs all.

    The norm of all gradients is not known before the last, so with ``clip`` each step takes two backward passes,
    the first of which only measures: call ``layers.backward(closure)`` instead of ``loss.backward()``. Sums of
    several passes cannot be clipped. What a forward pass counts, such as running means, is counted twice.

    Without ``clip``, a gradient that is not finite raises when other parameters have been stepped already. It
    knows one process only. Do not use it with a ``GradScaler``, gradient clipping outside, or reentrant
    checkpointing.

    Args:
        optimizer: what steps.
        accumulate: the number of backward passes of a step.
        clip: largest 2-norm of the gradient of all parameters, or None.

    Raises:
        ValueError: if an argument is out of range, both are asked for, or there are several processes.

    >>> from rankwise.optimizers import adam
    >>> model = nn.Linear(4, 2)
    >>> optimizer = Optimizer([(model.parameters(), adam())], lr=0.1)
    >>> layers = Layerwise(optimizer)
    >>> model(torch.ones(4)).sum().backward()  # has stepped
    >>> model.weight.grad is None
    True
    >>> optimizer.step()
    """

    def __init__(self, optimizer: Optimizer, *, accumulate: int = 1, clip: float | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"layer by layer steps a rankwise.Optimizer, got a {type(optimizer).__name__}.")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be >= 1 and whole, got {accumulate}.")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive or None, got {clip}.")
        if several():
            raise ValueError("layer by layer only one process trains: gradients would not be averaged.")
        self.optimizer, self.accumulate, self.clip = optimizer, accumulate, clip
        optimizer.within_backward = True
        self._check(accumulate)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._arrive: Callable[[Tensor], None] = self._collect
        self._scale: Tensor | None = None
        self._begin()
        self._hooks: list[Any] = [
            *(p.register_post_accumulate_grad_hook(lambda p: self._arrive(p)) for p in self._parameters),
            optimizer.register_step_pre_hook(lambda *_: self._flush()),
            optimizer.register_step_post_hook(lambda *_: self.discard()),  # also what the step itself took whole
            optimizer.register_load_state_dict_post_hook(lambda *_: self._begin()),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let the optimiser step in the usual way again; what was not stepped is dropped."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer.within_backward = False
        self.discard()

    def discard(self) -> None:
        """Drop what was collected since the last step; for ``zero_grad`` in the middle of a step."""
        self.optimizer.zero_grad()
        self._begin()

    def backward(self, loss: Loss) -> Tensor:
        """Compute a loss and step the parameters, clipped if that is wanted.

        Args:
            loss: computes it; with ``clip`` it is called twice, with the same random numbers for dropout.

        Returns:
            the loss, detached.

        Raises:
            NothingChanged: if the loss is not finite, or with ``clip`` a gradient.
            FloatingPointError: if a gradient is not finite.
        """
        if self.clip is not None:
            self._scale = (self.clip / (self._norm(loss) + 1e-6)).clamp(max=1.0)  # as torch clips
        try:
            return _backward(loss)
        finally:
            self._scale = None

    def take(self, losses: Sequence[Loss]) -> tuple[float, bool]:
        """Take one step; see :class:`Stepping`."""
        self._check(len(losses))
        self.accumulate = len(losses)
        total = 0.0
        for compute in losses:
            try:
                total += float(self.backward(compute))
            except NothingChanged as error:
                self.discard()
                return error.loss, False
        self.optimizer.step()
        return total, True

    def _check(self, accumulate: int) -> None:
        if self.clip is not None and accumulate > 1:
            raise ValueError(
                "the norm of gradients that are never held together is not known, so layer by layer the sum of "
                f"{accumulate} backward passes cannot be clipped; leave clip out, or use larger batches."
            )

    def _norm(self, loss: Loss) -> Tensor:
        """Return the 2-norm of the gradient of all parameters, of which one at a time is there.

        Raises:
            ValueError: if others train than did when this was made, or none has a gradient.
        """
        train = {p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        if train - {*self._parameters}:
            raise ValueError("parameters train that did not when Layerwise was made; make it again after that.")
        norms: dict[Tensor, Tensor] = {}

        def measure(param: Tensor) -> None:
            if param.grad is not None:
                norms[param] = torch.linalg.vector_norm(param.grad, 2)
            param.grad = None

        self._arrive = measure
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                value = _backward(loss)
        finally:
            self._arrive = self._collect
        found = [norms[p].to(device) for p in self._parameters if p in norms]
        if not found:
            raise ValueError("the loss reaches no parameter of the optimiser that trains.")
        norm = torch.linalg.vector_norm(torch.stack(found), 2)
        if not bool(norm.isfinite()):
            raise NothingChanged(float(value))
        return norm

    def _begin(self) -> None:
        """Expect the gradients of the next step."""
        self._seen: dict[Tensor, int] = {}
        self._sums: dict[Tensor, Tensor] = {}

    def _collect(self, param: Tensor) -> None:
        """Take the gradient of a parameter that has just become complete."""
        if self.clip is not None and self._scale is None:
            raise RuntimeError("with clip, call layers.backward(closure) instead of loss.backward().")
        count = self._seen[param] = self._seen.get(param, 0) + 1
        if count > self.accumulate:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} got {count} gradients, but a step takes "
                f"{self.accumulate}; call optimizer.step() after each step, layers.discard() after a backward "
                "pass that failed, or set accumulate. If one call runs several backward passes over it, as "
                "target projection does for recurrent or shared layers, it cannot be stepped layer by layer."
            )
        if self._scale is not None and param.grad is not None:
            param.grad.mul_(self._scale.to(param.grad.device))
        try:
            if self.accumulate > 1:
                self._add(param)
            if count == self.accumulate:
                self._finish(param)
        except FloatingPointError as error:
            self._begin()
            raise FloatingPointError(
                f"{str(error).partition(';')[0]}; other parameters may have been stepped already: go on from the "
                "last checkpoint, with a lower lr or with clip, which looks at all gradients first."
            ) from error

    def _add(self, param: Tensor) -> None:
        """Add the reduced gradient to those before, if there is one; else autograd adds up the whole ones."""
        low = self.optimizer.reduce_one(param)
        if low is not None:
            self._sums[param] = self._sums[param].add_(low) if param in self._sums else low
            param.grad = None

    def _finish(self, param: Tensor) -> None:
        """Step a parameter, and free its gradient."""
        self.optimizer.step_one(param, self._sums.pop(param, None))
        param.grad = None

    def _flush(self) -> None:
        """Step what got fewer gradients than the others; the optimiser itself takes what has a whole gradient."""
        for param in self._parameters:
            if param in self._sums:
                self._finish(param)


def _backward(loss: Loss) -> Tensor:
    """Compute a loss and its gradients; returns the loss, detached.

    Raises:
        NothingChanged: if it is not finite.
    """
    with torch.enable_grad():
        value = loss()
    if not bool(value.detach().isfinite()):
        raise NothingChanged(float(value.detach()))
    value.backward()
    return value.detach()
