"""A model as a chain: what comes before its blocks, the blocks, and what comes after them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.statistics import Batch
from ..core.watch import call_of, fed


@dataclass(frozen=True)
class Call:
    """One call of a block.

    Args:
        block: its number.
        x: the hidden state that it is given: the first positional argument, or else the first named tensor.
        others: what else it is given.
        run: goes through with it, for any hidden state.
    """

    block: int
    x: Tensor
    others: Any
    run: Callable[[Tensor], Any]


StandIn = Callable[[Call], Any]


def find_blocks(model: nn.Module) -> str:
    """Return the path of the list of modules that holds most parameters; of equals, the outermost.

    Raises:
        ValueError: if there is no list of at least two modules.

    >>> from torch import nn
    >>> find_blocks(nn.ModuleDict({"body": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}))
    'body'
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    if not sizes:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks; compress it in memory, all layers at once."
        )
    return max(sizes, key=lambda name: sizes[name])


class _Stop(Exception):
    """Leaves a forward pass whose rest is not needed."""


class Chain:
    """Runs one part of a model at a time, always inside the model's own forward pass.

    The pass prepares masks, positions and whatever else the blocks take; only the blocks are stood in for. So
    nothing here knows how a family calls its blocks, and blocks that are not run need no values.

    Args:
        model: of transformers, whose blocks form a chain: each takes the hidden state that the one before it
            returned, and nothing else that depends on it.
        blocks: path of the list of blocks.
    """

    def __init__(self, model: nn.Module, blocks: str) -> None:
        self.model, self.path = model, blocks
        modules: Any = model.get_submodule(blocks)
        self.blocks: list[nn.Module] = list(modules)
        self.names = [f"{blocks}.{i}" for i in range(len(self.blocks))]
        self.form: Callable[[Tensor], Any] = lambda x: x

    def enter(self, batch: Batch) -> Tensor:
        """Return the hidden state that enters the first block.

        Raises:
            ValueError: if something else that enters it has a gradient too.
        """

        def stand_in(call: Call) -> Tensor:
            if any(tensor.requires_grad for tensor in _tensors_in(call.others)):
                raise ValueError(
                    f"layers before the blocks at {self.path} also reach them past the hidden state, which "
                    "cannot be taken block by block; compress in memory and all at once, or leave them out with "
                    "'where'."
                )
            return call.x

        return self._until(batch, stand_in)

    def block(self, i: int, batch: Batch, x: Tensor) -> Tensor:
        """Return what block i makes of a hidden state."""
        return self._until(batch, lambda call: hidden_of(call.run(x)) if call.block == i else None)

    def leave(self, batch: Batch, x: Tensor, reached: Callable[[], None] = lambda: None) -> Any:
        """Return the model's output for the hidden state that leaves the last block.

        Args:
            batch: what the model takes.
            x: the hidden state.
            reached: is called where the last block stands.

        Raises:
            ValueError: if what comes before the blocks also reaches the output past them.
        """

        def stand_in(call: Call) -> Any:
            if call.block == 0 and torch.is_grad_enabled():
                call.x.requires_grad_().register_hook(self._refuse_detour)
            if call.block < len(self.blocks) - 1:
                return self.form(call.x)
            reached()
            return self.form(x)

        return self._run(batch, stand_in)

    def learn(self, batch: Batch) -> None:
        """Look at one pass, with the values of the first block filled, and check that the model is a chain.

        Raises:
            ValueError: if it is not.
        """
        rest: list[Any] = []

        def first(call: Call) -> Tensor:
            output = call.run(call.x)
            y = hidden_of(output)
            if y.shape != call.x.shape:
                raise ValueError(
                    f"{self.names[0]} turns {tuple(call.x.shape)} into {tuple(y.shape)}; only blocks that "
                    "keep the shape of the hidden state can follow each other: compress in memory, all at once."
                )
            if isinstance(output, tuple):
                rest.extend(output[1:])
                self.form = lambda x: (x, *rest)
            return y

        self._until(batch, first)
        one, other = (self._others(batch, change) for change in (torch.ones_like, torch.zeros_like))
        passed_on = any(t is each for t in one for each in rest)
        rest[:] = [None if isinstance(each, Tensor) else each for each in rest]  # such as attention weights
        if passed_on or len(one) != len(other) or not all(map(torch.equal, one, other)):
            raise ValueError(
                f"the blocks at {self.path} pass on more than the hidden state, which cannot be taken block by "
                "block; compress in memory, all at once."
            )

    def _others(self, batch: Batch, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the tensors that blocks take beside the hidden state, which is changed on the way."""
        found: list[Tensor] = []
        passed: list[Tensor] = []

        def stand_in(call: Call) -> Any:
            if call.block != len(passed) or (passed and passed[-1] is not call.x):
                raise ValueError(
                    f"the blocks at {self.path} do not each take what the one before returned, once and in "
                    "order; that cannot be taken block by block: compress in memory, all at once."
                )
            found.extend(_tensors_in(call.others))
            passed.append(change(call.x))
            return self.form(passed[-1])

        try:
            self._run(batch, stand_in)
        except RuntimeError as error:  # of shapes that do not fit
            raise ValueError(
                f"the blocks at {self.path} do not all keep the shape of the hidden state ({error}); compress in "
                "memory, all at once."
            ) from error
        if len(passed) != len(self.blocks):
            raise ValueError(f"only {len(passed)} of the {len(self.blocks)} blocks at {self.path} were run.")
        return found

    def _until(self, batch: Batch, stand_in: Callable[[Call], Tensor | None]) -> Tensor:
        """Run the model up to the first block for which something is returned, and return that."""
        found: list[Tensor] = []

        def stop(call: Call) -> Any:
            y = stand_in(call)
            if y is None:
                return self.form(call.x)
            found.append(y)
            raise _Stop

        try:
            self._run(batch, stop)
        except _Stop:
            return found[0]
        raise ValueError(f"the blocks at {self.path} were not run; compress in memory, all at once.")

    def _run(self, batch: Batch, stand_in: StandIn) -> Any:
        """Run the model, with a function in place of each block's forward."""
        device = next(p.device for p in self.model.parameters() if not p.is_meta)
        arguments, options = call_of(fed(self.model, batch), device)
        try:
            for i, block in enumerate(self.blocks):
                block.forward = _called(i, block.forward, stand_in)
            return self.model(*arguments, **options)
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _refuse_detour(self, gradient: Tensor) -> None:
        raise ValueError(
            f"what enters the blocks at {self.path} also goes around them, which cannot be taken block by block; "
            "compress in memory, all at once."
        )


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state in the output of a block: the output, or the first of several.

    Raises:
        ValueError: if it is no tensor.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        kind = type(hidden).__name__
        raise ValueError(
            f"a block returns a {kind}, which cannot be taken block by block; compress in memory, all at once."
        )
    return hidden


def _called(i: int, forward: Callable[..., Any], stand_in: StandIn) -> Callable[..., Any]:
    """Return a forward that describes each of its calls to the stand-in, and returns what that returns."""

    def by_position(x: Tensor, *args: Any, **options: Any) -> Any:
        return stand_in(Call(i, x, (args, options), lambda y: forward(y, *args, **options)))

    def by_name(**options: Any) -> Any:
        name = next(key for key, value in options.items() if isinstance(value, Tensor))
        x = options.pop(name)
        return stand_in(Call(i, x, options, lambda y: forward(**options, **{name: y})))

    return lambda *args, **options: (by_position if args else by_name)(*args, **options)


def _tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for inner in value for t in _tensors_in(inner)] if isinstance(value, (tuple, list)) else []
