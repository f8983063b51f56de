"""Preconditioning the gradients of a model at work."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..linalg import KhatriRao, seeded
from .agreement import agreed
from .capture import Capture, Rows
from .conditioned import Conditioned
from .exchange import Exchange, Traffic, parts_of, place
from .preconditioner import Curvature, Preconditioner, Shared, Size, damping_at
from .states import described

SPLIT = "\0"  # between the name of a block and that of a tensor


class Conditioning:
    """Turns the gradients of a model's layers into natural gradients; made by :func:`rankwise.precondition`.

    Args:
        model: trains.
        method: of preconditioning.
        layers: what is preconditioned, by name.
        kl_clip: see :func:`rankwise.precondition`.
        optimizer: whose first learning rate ``kl_clip`` reads.
        workers: share of the processes that multiply the gradients of one block.
        traffic: counts bytes and seconds.
        group: of processes.
        axis: of the samples, see :func:`rankwise.precondition`.
        seed: of what methods draw.

    Raises:
        ValueError: if ``workers`` is not a share that divides the processes.
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
        self.model, self.method, self.layers = model, method, dict(layers)
        self.kl_clip, self.optimizer, self.seed = kl_clip, optimizer, seed
        self.steps, self.skipped = 0, 0
        self.blocks = {"all": [*layers]} if method.whole else {name: [name] for name in layers}
        self.curvature: dict[str, Curvature] = {block: {} for block in self.blocks}
        self.inverted: set[str] = set()
        self.exchange = Exchange(traffic or Traffic(), group, self.device)
        self.parts = parts_of(self.exchange.size, workers)
        if method.projects and self.parts > 1:
            raise ValueError(f"{type(method).__name__} needs all inverses on all processes; take workers=1.")
        self.within = self.exchange.divided(self.parts)  # the processes that multiply the same gradients
        self.part_of, self.owner_of = self._places()
        self.capture = Capture(model, layers, axis, reduces=method.reduces)
        self._look()

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return next(iter(self.layers.values())).weight.device

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
            ValueError: if a layer has a gradient but was not called as a module, or has another weight than at
                the beginning; if gradients differ between processes; if the damping, scale or positions are not
                positive.
            RuntimeError: if other processes do not answer.
        """
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a number > 0, got {scale}.")
        if not 0 < positions < float("inf"):
            raise ValueError(f"positions must be a number > 0, got {positions}.")
        damping = damping_at(self.method.damping, self.steps)
        with torch.autocast(self.device.type, enabled=False):
            gradients = self._gradients()
            norms = agreed(self.exchange, gradients, [*self.layers], self.steps)
            if not all(norm < float("inf") for norm in norms.values()):
                self.skip()
                warnings.warn(
                    f"a gradient is not finite: this step is passed over, the {self.skipped}. in all.",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return False
            layers = {name for name, norm in norms.items() if norm}
            moving = [block for block, names in self.blocks.items() if layers.intersection(names)]
            if self.capture.wanted:
                self._refresh(moving, layers, scale / positions**0.5, damping)  # F by the terms
            self._invert_lacking(moving, damping)
            natural = self._multiply(moving, gradients, damping)
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
        sizes = {
            name: Size(
                layer.shape,
                layer.tokens,
                samples,
                positions,
                torch.promote_types(layer.weight.dtype, torch.float32),
            )
            for name, layer in self.layers.items()
        }
        return sum(self.method.state_bytes([sizes[n] for n in names]) for names in self.blocks.values())

    def traffic(self) -> dict[str, dict[str, float]]:
        """Return bytes, seconds and times of each phase, summed since the beginning; see :class:`Traffic`.

        ``agree`` is asking whether all have the same gradients, ``factorise`` what each process makes of its
        samples and of what it was told, ``exchange`` is telling,
        ``invert`` the work of this process for all, ``broadcast`` the giving of inverses, ``apply`` the
        multiplication at each step, and ``gradients`` their giving to processes that do not multiply.
        """
        return self.exchange.traffic.table()

    def about(self) -> dict[str, Any]:
        """Say as plain data what decides about the natural gradients, without the state."""
        return {
            "method": described(self.method),
            "layers": [*self.layers],
            "kl_clip": self.kl_clip,
            "seed": self.seed,
        }

    def summary(self) -> dict[str, Any]:
        """Say as plain data what was done: the method, steps, steps passed over, and the :meth:`traffic`."""
        done = {"layers": len(self.layers), "steps": self.steps, "skipped": self.skipped}
        return {"method": described(self.method), **done, "phases": self.traffic()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: nested dictionaries of tensors, numbers and strings.

        Samples seen since the last step are not part of it. It is the same on all processes, but that, where
        ``workers`` is below one, each holds inverses only for the layers whose gradients it multiplies.
        """
        return {
            "method": self.method.form(),
            "steps": self.steps,
            "skipped": self.skipped,
            "inverted": sorted(self.inverted),
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
        if other := sorted(state["curvature"].keys() ^ self.blocks.keys()):
            raise ValueError(f"the state is of other layers: {', '.join(other)}.")
        self.steps, self.skipped, self.inverted = state["steps"], state["skipped"], {*state["inverted"]}
        self.curvature = {
            block: {
                name: tensor.to(self.device if tensor.dim() else "cpu", copy=True)
                for name, tensor in tensors.items()
            }
            for block, tensors in state["curvature"].items()
        }
        self.discard()
        self._look()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.capture.remove()

    def __repr__(self) -> str:
        """Name the method and count the layers."""
        return f"Conditioning({type(self.method).__name__}, {len(self.layers)} layers, {self.steps} steps)"

    def _places(self) -> tuple[dict[str, int], dict[str, int]]:
        """Say which part of the processes multiplies the gradients of a block, and which of them inverts."""
        costs = {block: self.method.cost(self._shapes(block)) for block in self.blocks}
        part_of = place(costs, self.parts)
        owners: dict[str, int] = {}
        for part in range(self.parts):
            owners |= place({b: cost for b, cost in costs.items() if part_of[b] == part}, self.within.size)
        return part_of, owners

    def _shapes(self, block: str) -> list[tuple[int, int]]:
        return [self.layers[name].shape for name in self.blocks[block]]

    def _mine(self, block: str) -> bool:
        """Whether this process multiplies the gradients of a block."""
        return self.part_of[block] == self.exchange.rank // self.within.size

    def _look(self) -> None:
        """Say what the next step will look at: all layers, or those of which nothing is known."""
        due = self.method.captures(self.steps)
        blocks = [block for block, known in self.curvature.items() if due or not known]
        names = {name for block in blocks for name in self.blocks[block]}
        self.capture.wanted = names if self.method.sees_rows else ()

    def _gradients(self) -> dict[str, Tensor]:
        """Return the gradients that layers have."""
        found = {}
        for name, layer in self.layers.items():
            if layer.site.layer.get_parameter("weight") is not layer.weight:
                raise ValueError(
                    f"layer {name} has another weight than at the beginning; call rankwise.precondition after "
                    "what gives it one, such as fully_shard."
                )
            gradient = layer.gradient()
            if gradient is not None:
                found[name] = gradient
        return found

    def _put(self, natural: Mapping[str, Tensor], factor: float) -> None:
        """Let natural gradients be the gradients, or nothing where this is interrupted."""
        try:
            for name, gradient in natural.items():
                self.layers[name].put(gradient * factor)
        except BaseException:
            for parameter in self.model.parameters():
                parameter.grad = None
            raise

    def _refresh(self, moving: Iterable[str], layers: Collection[str], scale: float, damping: float) -> None:
        """Look at the samples, tell the other processes, and invert."""
        due, traffic = self.method.captures(self.steps), self.exchange.traffic
        blocks = [block for block in moving if due or not self.curvature[block]]
        if not blocks:  # those of which nothing is known wait
            return self.capture.clear()
        own = self.capture.samples()
        with traffic.phase("factorise"):
            seen = self.capture.take(scale)
        with traffic.phase("exchange"):
            samples = self._count(own, [n for block in blocks for n in self.blocks[block] if n in layers], seen)
            self._decide(blocks)
        with traffic.phase("factorise"):
            shared = {
                block: self.method.local(
                    [seen.get(name) or self._nothing(name, own) for name in self.blocks[block]],
                    self.curvature[block],
                    self._generator(i),
                    samples,
                    damping,
                )
                for i, block in enumerate(self.blocks)
                if block in blocks
            }
        with traffic.phase("exchange"):
            sums = _cut(self.exchange.add("exchange", _named({b: s.sums for b, s in shared.items()})), blocks)
            rows = _cut(self.exchange.gather("exchange", _named({b: s.rows for b, s in shared.items()})), blocks)
        with traffic.phase("factorise"):
            for block in blocks:
                self.method.update(Shared(sums[block], rows[block]), samples, self.curvature[block])
                self.curvature[block].update(_dense(self.curvature[block]))
        wanted = self.method.inverts(self.steps)
        self._invert([block for block in blocks if wanted or block not in self.inverted], damping)

    def _decide(self, blocks: Iterable[str]) -> None:
        """Let what the first process found in gradients hold for all: others may have rounded otherwise."""
        if self.exchange.size > 1 and self.method.decisions:
            known = {block: self.curvature[block] for block in blocks}
            own = {
                b: {n: tensors[n] for n in self.method.decisions & tensors.keys()} for b, tensors in known.items()
            }
            told = self.exchange.spread("exchange", _named(own) if self.exchange.rank == 0 else {}, {0})
            for block, found in _cut(told, known).items():
                self.curvature[block].update(found)

    def _invert_lacking(self, moving: Iterable[str], damping: float) -> None:
        """Invert what a state lacks that was saved by a process for other layers."""
        lacking = [b for b in moving if self._mine(b) and self.curvature[b] and b not in self.inverted]
        if self.method.sees_rows and lacking:
            with self.exchange.traffic.phase("invert"):
                for block in lacking:
                    inverse = self.method.invert(self.curvature[block], damping, self._shapes(block))
                    self.curvature[block].update(_dense(inverse))
            self.inverted.update(lacking)

    def _invert(self, blocks: Iterable[str], damping: float) -> None:
        """Invert for the blocks that this process owns, and share with those that multiply the same gradients."""
        owners = {block: self.owner_of[block] for block in blocks if self._mine(block)}
        with self.exchange.traffic.phase("invert"):
            own = {
                block: _dense(self.method.invert(self.curvature[block], damping, self._shapes(block)))
                for block, owner in owners.items()
                if owner == self.within.rank
            }
        with self.exchange.traffic.phase("broadcast"):
            every = _cut(self.within.spread("broadcast", _named(own), {*owners.values()}), owners)
        for block, inverse in every.items():
            self.curvature[block].update(inverse)
        self.inverted.update(owners)

    def _multiply(
        self, moving: Iterable[str], gradients: Mapping[str, Tensor], damping: float
    ) -> dict[str, Tensor]:
        """Return the natural gradients of all layers that have gradients."""
        natural: dict[str, Tensor] = {}
        with self.exchange.traffic.phase("apply"):
            for block in moving:
                names, curvature = self.blocks[block], self.curvature[block]
                given = [gradients[n] if n in gradients else self._zeros(n) for n in names]
                self.method.observe(given, curvature, damping)
                if self._mine(block):
                    found = self.method.apply(given, curvature, damping)
                    natural |= {n: g for n, g in zip(names, found, strict=True) if n in gradients}
        if self.parts == 1:
            return natural
        with self.exchange.traffic.phase("gradients"):
            width = self.within.size
            owners = {block: self.part_of[block] * width + self.owner_of[block] for block in moving}
            own = {
                n: natural[n]
                for block, owner in owners.items()
                if owner == self.exchange.rank
                for n in self.blocks[block]
                if n in natural
            }
            return self.exchange.spread("gradients", own, {*owners.values()})

    def _shortening(self, gradients: Mapping[str, Tensor], natural: Mapping[str, Tensor]) -> float:
        """Return what keeps the predicted change of the model's outputs below ``kl_clip``."""
        if self.kl_clip is None or not natural:
            return 1.0
        assert self.optimizer is not None
        rate = float(self.optimizer.param_groups[0]["lr"])
        change = float(torch.stack([(natural[name] * gradients[name]).sum() for name in natural]).sum())
        return min(1.0, (self.kl_clip / max(abs(rate**2 * change), 1e-30)) ** 0.5)

    def _count(self, own: int, names: Sequence[str], seen: Mapping[str, Rows]) -> int:
        """Return the samples of all processes, of which ``own`` are here.

        Raises:
            ValueError: if no process saw any for a layer that has a gradient.
        """
        mine = [own, *(len(seen[name].each) if name in seen else 0 for name in names)]
        counts = self.exchange.add("exchange", {"counts": torch.tensor(mine, device=self.device)})[
            "counts"
        ].tolist()
        for name, count in zip(names, counts[1:], strict=True):
            if not count:
                raise ValueError(
                    f"layer {name} has a gradient, but was not called as a module in a forward pass that the "
                    "loss depends on; leave it out with 'where'. Code that torch.compile made "
                    "before the handle passes over it until torch.compiler.reset()."
                )
        return counts[0]

    def _nothing(self, name: str, own: int) -> Rows:
        """What a process knows of a layer that it did not call: nothing, or, beside other layers, only zeros."""
        layer = self.layers[name]
        samples = own if self.method.whole else 0
        (m, n), zeros = layer.shape, self._zeros(name)
        inputs = zeros.new_zeros(samples, 1, *(() if layer.tokens else (n,)))
        each = KhatriRao(inputs.long() if layer.tokens else inputs, zeros.new_zeros(samples, 1, m), n)
        return Rows(each, own)

    def _zeros(self, name: str) -> Tensor:
        weight = self.layers[name].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(self.layers[name].shape, dtype=dtype, device=weight.device)

    def _generator(self, block: int) -> Generator:
        """Return random numbers that depend on the step, the process and the block alone."""
        return seeded(self.seed, self.steps, self.exchange.rank, block, device=self.device)


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let numbers lie in memory as they do after a broadcast or in a file, on which rounding depends."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _named(nested: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put the tensors of all blocks into one mapping."""
    return {f"{block}{SPLIT}{name}": t for block, tensors in nested.items() for name, t in tensors.items()}


def _cut(tensors: Mapping[str, Tensor], blocks: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Undo :func:`_named`."""
    found: dict[str, dict[str, Tensor]] = {block: {} for block in blocks}
    for name, tensor in tensors.items():
        block, _, own = name.partition(SPLIT)
        found[block][own] = tensor
    return found
