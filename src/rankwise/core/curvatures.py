"""What is known of the curvature of all blocks of layers, and which processes invert and multiply."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from ..linalg import KhatriRao, seeded
from .capture import Rows
from .conditioned import Conditioned
from .exchange import Exchange, parts_of, place
from .preconditioner import Curvature, Preconditioner, Shared, Size

SPLIT = "\0"  # between the name of a block and that of a tensor


class Curvatures:
    """The curvature of each block: brought up to date by all processes, inverted by one, used by some or all.

    Args:
        method: of preconditioning.
        layers: what is preconditioned, by name.
        exchange: with the other processes.
        workers: share of the processes that multiply the gradients of one block.
        seed: of what methods draw.

    Raises:
        ValueError: if ``workers`` is not a share that divides the processes.
    """

    def __init__(
        self,
        method: Preconditioner,
        layers: Mapping[str, Conditioned],
        exchange: Exchange,
        workers: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.method, self.layers, self.exchange, self.seed = method, layers, exchange, seed
        self.blocks = {"all": [*layers]} if method.whole else {name: [name] for name in layers}
        self.known: dict[str, Curvature] = {block: {} for block in self.blocks}
        self.inverted: set[str] = set()
        self.parts = parts_of(exchange.size, workers)
        if method.projects and self.parts > 1:
            raise ValueError(f"{type(method).__name__} needs all inverses on all processes; take workers=1.")
        self.within = exchange.divided(self.parts)  # the processes that multiply the same gradients
        self.part_of, self.owner_of = self._places()

    def wanted(self, step: int) -> Collection[str]:
        """Return the layers whose samples a step looks at: all, or those of which nothing is known."""
        due = self.method.captures(step)
        blocks = [block for block, known in self.known.items() if due or not known]
        return {name for block in blocks for name in self.blocks[block]} if self.method.sees_rows else ()

    def moving(self, layers: Collection[str]) -> list[str]:
        """Return the blocks of which some of these layers are part."""
        return [block for block, names in self.blocks.items() if not {*names}.isdisjoint(layers)]

    def refresh(
        self, step: int, layers: Collection[str], seen: Mapping[str, Rows], own: int, damping: float
    ) -> None:
        """Make of the samples what others need to know, tell them, and invert.

        Args:
            step: its number.
            layers: that have a gradient.
            seen: samples of this process, by layers.
            own: how many of the model's samples were here.
            damping: of this step.

        Raises:
            ValueError: if no process saw any samples of a layer that has a gradient.
        """
        due, traffic = self.method.captures(step), self.exchange.traffic
        blocks = [block for block in self.moving(layers) if due or not self.known[block]]
        if not blocks:  # those of which nothing is known wait
            return
        with traffic.phase("exchange"):
            samples = self._count(own, [n for block in blocks for n in self.blocks[block] if n in layers], seen)
            self._decide(blocks)
        with traffic.phase("factorise"):
            shared = {
                block: self.method.local(
                    [seen.get(name) or self._nothing(name, own) for name in self.blocks[block]],
                    self.known[block],
                    self._generator(step, i),
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
                self.method.update(Shared(sums[block], rows[block]), samples, self.known[block])
                self.known[block].update(_dense(self.known[block]))
        wanted = self.method.inverts(step)
        self._invert([block for block in blocks if wanted or block not in self.inverted], damping)

    def invert_lacking(self, layers: Collection[str], damping: float) -> None:
        """Invert what a state lacks that was saved by a process for other layers."""
        moving = self.moving(layers)
        lacking = [b for b in moving if self.multiplies(b) and self.known[b] and b not in self.inverted]
        if self.method.sees_rows and lacking:
            with self.exchange.traffic.phase("invert"):
                for block in lacking:
                    inverse = self.method.invert(self.known[block], damping, self._shapes(block))
                    self.known[block].update(_dense(inverse))
            self.inverted.update(lacking)

    def multiply(
        self, gradients: Mapping[str, Tensor], layers: Collection[str], damping: float
    ) -> dict[str, Tensor]:
        """Return the natural gradients of all layers that have gradients.

        Args:
            gradients: (m, n) of each layer that has one.
            layers: that count as having one, which is the same on all processes.
            damping: of this step.
        """
        natural: dict[str, Tensor] = {}
        moving = self.moving(layers)
        with self.exchange.traffic.phase("apply"):
            for block in moving:
                names, curvature = self.blocks[block], self.known[block]
                given = [gradients[n] if n in gradients else self._zeros(n) for n in names]
                self.method.observe(given, curvature, damping)
                if self.multiplies(block):
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

    def state_bytes(self, samples: int, positions: int = 1) -> int:
        """Return how many bytes all of it will at least take on this process; see :class:`Conditioning`."""
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

    def load(self, known: Mapping[str, Mapping[str, Tensor]], inverted: Iterable[str]) -> None:
        """Take copies of curvatures, and the names of the blocks whose inverses are among them."""
        self.inverted = {*inverted}
        self.known = {
            block: {
                name: tensor.to(self.exchange.device if tensor.dim() else "cpu", copy=True)
                for name, tensor in tensors.items()
            }
            for block, tensors in known.items()
        }

    def multiplies(self, block: str) -> bool:
        """Whether this process multiplies the gradients of a block."""
        return self.part_of[block] == self.exchange.rank // self.within.size

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

    def _decide(self, blocks: Iterable[str]) -> None:
        """Let what the first process found in gradients hold for all: others may have rounded otherwise."""
        if self.exchange.size > 1 and self.method.decisions:
            known = {block: self.known[block] for block in blocks}
            own = {
                b: {n: tensors[n] for n in self.method.decisions & tensors.keys()} for b, tensors in known.items()
            }
            told = self.exchange.spread("exchange", _named(own) if self.exchange.rank == 0 else {}, {0})
            for block, found in _cut(told, known).items():
                self.known[block].update(found)

    def _invert(self, blocks: Iterable[str], damping: float) -> None:
        """Invert for the blocks that this process owns, and share with those that multiply the same gradients."""
        owners = {block: self.owner_of[block] for block in blocks if self.multiplies(block)}
        with self.exchange.traffic.phase("invert"):
            own = {
                block: _dense(self.method.invert(self.known[block], damping, self._shapes(block)))
                for block, owner in owners.items()
                if owner == self.within.rank
            }
        with self.exchange.traffic.phase("broadcast"):
            every = _cut(self.within.spread("broadcast", _named(own), {*owners.values()}), owners)
        for block, inverse in every.items():
            self.known[block].update(inverse)
        self.inverted.update(owners)

    def _count(self, own: int, names: Sequence[str], seen: Mapping[str, Rows]) -> int:
        """Return the samples of all processes, of which ``own`` are here.

        Raises:
            ValueError: if no process saw any for a layer that has a gradient.
        """
        mine = [own, *(len(seen[name].each) if name in seen else 0 for name in names)]
        counts = self.exchange.add("exchange", {"counts": torch.tensor(mine, device=self.exchange.device)})[
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

    def _generator(self, step: int, block: int) -> Generator:
        """Return random numbers that depend on the step, the process and the block alone."""
        return seeded(self.seed, step, self.exchange.rank, block, device=self.exchange.device)


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
