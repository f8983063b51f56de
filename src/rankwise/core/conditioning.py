"""Preconditioning the gradients of a model at work."""

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import agreed
from .capture import Capture
from .conditioned import Conditioned, held
from .curvatures import Curvatures
from .exchange import Exchange, Traffic
from .preconditioner import Curvature, Preconditioner, damping_at
from .states import described

_AT_WORK: "weakref.WeakSet[Conditioning]" = weakref.WeakSet()  # handles whose hooks are on


class Conditioning:
    """Turns the gradients of a model's layers into natural gradients; made by :func:`rankwise.precondition`.

    Args:
        model: trains.
        method: of preconditioning.
        layers: what is preconditioned, by name.
        kl_clip: see :func:`rankwise.precondition`.
        optimizer: whose learning rates ``kl_clip`` reads.
        workers: share of the processes that multiply the gradients of one block.
        traffic: counts bytes and seconds.
        group: of processes.
        axis: of the samples, see :func:`rankwise.precondition`.
        seed: of what methods draw.

    Raises:
        ValueError: if ``workers`` is not a share that divides the processes, or another handle that was not
            removed changes the gradients of one of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Preconditioner,
        layers: Mapping[str, Conditioned],
        *,
        kl_clip: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        workers: float = 1.0,
        traffic: Traffic | None = None,
        group: Any = None,
        axis: int = 0,
        seed: int = 0,
    ) -> None:
        own = {id(layer.site.layer) for layer in layers.values()}
        for other in _AT_WORK:
            if shared := [name for name, layer in other.layers.items() if id(layer.site.layer) in own]:
                raise ValueError(
                    f"layer {shared[0]} is preconditioned already; call remove() of that handle first, or leave "
                    "the layer out with 'where'."
                )
        self.model, self.method, self.layers = model, method, dict(layers)
        self.kl_clip, self.optimizer = kl_clip, optimizer
        self.steps, self.skipped = 0, 0
        self.exchange = Exchange(traffic or Traffic(), group, self.device)
        self.curvatures = Curvatures(method, self.layers, self.exchange, workers, seed)
        self.capture = Capture(model, layers, axis, reduces=method.reduces)
        weakref.finalize(self, self.capture.remove)
        self._look()
        _AT_WORK.add(self)

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return next(iter(self.layers.values())).weight.device

    @property
    def curvature(self) -> dict[str, Curvature]:
        """What is known of the curvature of each block of layers."""
        return self.curvatures.known

    @torch.no_grad()
    def step(self, *, scale: float = 1.0, positions: float = 1.0) -> bool:
        """Turn the gradients that the model has into natural gradients; call it before the optimiser's step.

        Gradients must be averaged over processes and divided by a gradient scaler's factor already, and not yet
        clipped. Where one of them is not finite, all gradients of the model are taken away with a warning, so
        that the optimiser passes over its parameters, and the curvature stays as it was. An error or an interrupt
        leaves either the gradients as they were or none at all; go on from a saved state then.

        Args:
            scale: what the loss was multiplied by before the backward pass: ``scaler.get_scale()``.
            positions: how many terms T the loss of one sample is a mean over, such as the labels of a sequence;
                on average over the samples where they differ. F is then that of the terms, T times that of such
                means, so that damping means the same for sequences as for their tokens one by one.

        Returns:
            whether the step was taken.

        Raises:
            ValueError: if no layer has a gradient; if one has but was not called as a module, or has another
                weight than at the beginning; if gradients differ between processes; if the damping, scale or
                positions are not positive.
            RuntimeError: if other processes do not answer.
        """
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a number > 0, got {scale}.")
        if not 0 < positions < float("inf"):
            raise ValueError(f"positions must be a number > 0, got {positions}.")
        damping = damping_at(self.method.damping, self.steps)
        with torch.autocast(self.device.type, enabled=False):
            gradients = self._gradients()
            norms = agreed(self.exchange, gradients, [*self.layers], self.steps, sound=self._others_finite())
            if not norms:
                raise ValueError("no layer has a gradient; call loss.backward() before this step.")
            if not all(norm < float("inf") for norm in norms.values()):
                self.skip()
                warnings.warn(
                    f"a gradient is not finite: this step is passed over, the {self.skipped}. in all.",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return False
            layers = {name for name, norm in norms.items() if norm}
            if self.capture.wanted:
                own = self.capture.samples()
                with self.exchange.traffic.phase("factorise"):
                    seen = self.capture.take(scale / positions**0.5)  # F by the terms
                self.curvatures.refresh(self.steps, layers, seen, own, damping)
            self.curvatures.invert_lacking(layers, damping)
            natural = self.curvatures.multiply(gradients, layers, damping)
            self._put(natural, self._shortening(gradients, natural))
        self.steps += 1
        self._look()
        return True

    def skip(self) -> None:
        """Pass over a step: take all gradients of the model away, and forget what led to them."""
        self.skipped += 1
        self.discard()
        for parameter in self.model.parameters():
            parameter.grad = None

    def discard(self) -> None:
        """Forget the samples since the last step; for gradients that are dropped, or not those of the loss."""
        self.capture.clear()

    def samples(self) -> int:
        """Return how many samples this process saw since the last step; none where the step looks at none."""
        return self.capture.samples()

    def state_bytes(self, samples: int, positions: int = 1) -> int:
        """Return how many bytes the state will at least take on this process, from shapes alone.

        Args:
            samples: of a step, of all processes.
            positions: of a sample, such as the tokens of a sequence.
        """
        return self.curvatures.state_bytes(samples, positions)

    def traffic(self) -> dict[str, dict[str, float]]:
        """Return bytes, seconds and times of each phase, summed since the beginning; see :class:`Traffic`.

        ``agree`` is asking whether all have the same gradients, ``factorise`` what each process makes of its
        samples and of what it was told, ``exchange`` is telling, ``invert`` the work of this process for all,
        ``broadcast`` the giving of inverses, ``apply`` the multiplication at each step, and ``gradients`` their
        giving to processes that do not multiply.
        """
        return self.exchange.traffic.table()

    def about(self) -> dict[str, Any]:
        """Say as plain data what decides about the natural gradients, without the state."""
        return {
            "method": described(self.method),
            "layers": [*self.layers],
            "kl_clip": self.kl_clip,
            "seed": self.curvatures.seed,
        }

    def summary(self) -> dict[str, Any]:
        """Say as plain data what was done: the method, steps, steps passed over, and the :meth:`traffic`."""
        done = {"layers": len(self.layers), "steps": self.steps, "skipped": self.skipped}
        return {"method": described(self.method), **done, "phases": self.traffic()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: nested dictionaries of tensors, numbers and strings.

        Samples seen since the last step are not part of it. Its tensors are those at work, which later steps may
        write into: copy what is kept in memory. It is the same on all processes, but that, where
        ``workers`` is below one, each holds inverses only for the layers whose gradients it multiplies.
        """
        return {
            "method": self.method.form(),
            "layers": self._sizes(),
            "steps": self.steps,
            "skipped": self.skipped,
            "inverted": sorted(self.curvatures.inverted),
            "curvature": {block: dict(tensors) for block, tensors in self.curvature.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state; what follows is bit by bit what would have followed.

        The number of processes may be another one. An inverse that this process needs and the state lacks, as it
        was saved where ``workers`` is below one by a process for other layers, is made again at the next step,
        from the curvature and the damping of then.

        Raises:
            ValueError: if it is of another method, of one with another :meth:`Preconditioner.form`, or of other
                layers.
        """
        kept, own = state["method"], self.method.form()
        if kept["kind"] != own["kind"]:
            raise ValueError(f"the state is of {kept['kind']}, not of {own['kind']}.")
        if others := [name for name in sorted(kept.keys() | own.keys()) if kept.get(name) != own.get(name)]:
            words = "; ".join(f"{name}={kept.get(name)}, not of {own.get(name)}" for name in others)
            raise ValueError(f"the state is of {own['kind']} with {words}; make the handle with the same.")
        there, here = state.get("layers", {}), self._sizes()
        if others := [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]:
            words = ", ".join(f"{name} {there.get(name)} (here {here.get(name)})" for name in others[:3])
            raise ValueError(f"the state is of other layers, {len(others)} in all: {words}.")
        self.curvatures.load(state["curvature"], state["inverted"])
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.discard()
        self._look()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.capture.remove()
        _AT_WORK.discard(self)

    def __repr__(self) -> str:
        """Name the method and count the layers."""
        return f"Conditioning({type(self.method).__name__}, {len(self.layers)} layers, {self.steps} steps)"

    def _sizes(self) -> dict[str, list[int]]:
        """Return the [m, n] of each layer."""
        return {name: [*layer.shape] for name, layer in self.layers.items()}

    def _look(self) -> None:
        """Let the next step see what it needs."""
        self.capture.wanted = self.curvatures.wanted(self.steps)

    def _gradients(self) -> dict[str, Tensor]:
        """Return the gradients that layers have."""
        found = {}
        for name, layer in self.layers.items():
            if layer.site.layer.get_parameter("weight") is not layer.weight:
                raise ValueError(
                    f"layer {name} has another weight than at the beginning; call rankwise.precondition after "
                    "what gives it one, such as fully_shard."
                )
            if layer.bias is not None and not layer.bias.requires_grad:
                raise ValueError(f"the bias of layer {name} was frozen; call rankwise.precondition after that.")
            gradient = layer.gradient()
            if gradient is not None:
                found[name] = gradient
        return found

    def _others_finite(self) -> bool:
        """Whether what this process holds of gradients that stay as they are is finite."""
        own = {id(each) for layer in self.layers.values() for each in (layer.weight, layer.bias)}
        others = [p.grad for p in self.model.parameters() if p.grad is not None and id(p) not in own]
        norms = [torch.linalg.vector_norm(held(grad), dtype=torch.float64).to(self.device) for grad in others]
        return not norms or bool(torch.stack(norms).isfinite().all())

    def _put(self, natural: Mapping[str, Tensor], factor: float) -> None:
        """Let natural gradients be the gradients, or nothing where this is interrupted."""
        try:
            for name, gradient in natural.items():
                self.layers[name].put(gradient * factor)
        except BaseException:
            for parameter in self.model.parameters():
                parameter.grad = None
            raise

    def _shortening(self, gradients: Mapping[str, Tensor], natural: Mapping[str, Tensor]) -> float:
        """Return what keeps the predicted change of the model's outputs below ``kl_clip``."""
        if self.kl_clip is None or not natural:
            return 1.0
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        parts = []
        for name, each in natural.items():
            layer = self.layers[name]
            rate = max(rates.get(id(p), 0.0) for p in (layer.weight, layer.bias))
            parts.append(rate**2 * (each * gradients[name]).sum(dtype=torch.float64))
        return min(1.0, (self.kl_clip / max(abs(float(torch.stack(parts).sum())), 1e-30)) ** 0.5)
