"""How steps are written into parameters: with which rounding."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ..linalg import seeded, stochastic_bfloat16
from .directions import Direction, Factors, add_to
from .states import State, counter

foreach_add: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
foreach_mul: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]


class Write(abc.ABC):
    """Changes parameters by ``p <- keep * p + factor * direction``."""

    def init(self, param: Tensor, index: Tensor) -> State:
        """Return what is remembered from step to step; tensors with a leading axis, as the state of a transform.

        Args:
            param: one parameter, of which only shape and type are looked at.
            index: (1,) on the CPU, its place among all; for seeds.

        Raises:
            ValueError: if parameters of this type cannot be written.
        """
        return {}

    def read(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the values of parameters, where they are kept elsewhere."""
        return params

    @abc.abstractmethod
    def __call__(
        self, params: Sequence[Tensor], directions: Sequence[Direction], keep: float, factor: float, state: State
    ) -> None:
        """Write a step.

        Args:
            params: k parameters of one shape and type, written into.
            directions: k tensors of their shape, in the type of gradients; or products (1, m, n) for matrices.
            keep: 1, or less where weights decay.
            factor: of directions.
            state: what ``init`` returned, with a leading axis of k; written into.
        """

    def put(self, params: Sequence[Tensor], values: Sequence[Tensor], state: State) -> None:
        """Write what a constraint makes of parameters, after a step; arguments as in a call."""
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


@dataclass(frozen=True)
class Nearest(Write):
    """Round to the nearest number of the parameters' type: what is below half a step of it is lost."""

    def __call__(
        self, params: Sequence[Tensor], directions: Sequence[Direction], keep: float, factor: float, state: State
    ) -> None:
        """Shrink, then add; products go into matrices of their type without being formed."""
        if isinstance(directions[0], Factors) and directions[0].dtype == params[0].dtype:
            for param, direction in zip(params, directions, strict=True):
                add_to(param.unsqueeze(0), direction, keep=keep, factor=factor)
            return
        if keep != 1:
            foreach_mul(list(params), keep)
        foreach_add(list(params), [whole(each) for each in directions], alpha=factor)


@dataclass(frozen=True)
class StochasticRounding(Write):
    """Round bfloat16 parameters at random, so that steps far below their precision count on average.

    bfloat16 has 8 bits: a step below 1/512 of a weight is lost by rounding to the nearest, and so is the usual
    weight decay. The random numbers follow from a seed, the parameter's place and the number of its steps, which
    the optimiser saves: a run that is resumed goes on with the same bits. Longer types are rounded to nearest.

    Args:
        seed: of the random numbers.

    >>> import rankwise
    >>> from rankwise.optimizers import sgd
    >>> weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    >>> optimizer = rankwise.Optimizer([([weight], sgd())], lr=1e-3, write=StochasticRounding())
    >>> weight.grad = torch.ones_like(weight)
    >>> optimizer.step()
    >>> round(float(weight.detach().float().mean()), 3)
    0.999
    """

    seed: int = 0

    def init(self, param: Tensor, index: Tensor) -> State:
        """The place of a parameter, and how often it was written: its type may change."""
        _check_type(param)
        return {"index": index.clone(), "count": counter(index)}

    def __call__(
        self, params: Sequence[Tensor], directions: Sequence[Direction], keep: float, factor: float, state: State
    ) -> None:
        """Shrink and add in float32, and round once."""
        seeds = zip(state["index"].tolist(), state["count"].add_(1).tolist(), strict=True)
        if params[0].dtype != torch.bfloat16:
            _check_type(params[0])
            return Nearest()(params, directions, keep, factor, state)
        for param, direction, seed in zip(params, directions, seeds, strict=True):
            written(param, direction, keep, factor, seeded(self.seed, *seed, device=param.device))

    def put(self, params: Sequence[Tensor], values: Sequence[Tensor], state: State) -> None:
        """Round at random again, by other numbers than the step's."""
        if params[0].dtype != torch.bfloat16:
            return super().put(params, values, state)
        put_at_random(params, values, self.seed, state)


def _check_type(param: Tensor) -> None:
    if param.dtype == torch.float16:
        raise ValueError("stochastic rounding is for bfloat16; float16 needs float32 weights beside it.")


def usual_write(dtype: torch.dtype, seed: int = 0) -> Write:
    """Return how steps go into parameters of a type unless something else is asked for.

    Raises:
        ValueError: if it is float16.
    """
    if dtype == torch.float16:
        raise ValueError("small steps of float16 weights are lost; give them in bfloat16 or float32.")
    return StochasticRounding(seed) if dtype == torch.bfloat16 else Nearest()


def put_at_random(params: Sequence[Tensor], values: Sequence[Tensor], seed: int, state: State) -> None:
    """Write values into parameters; bfloat16 is rounded at random."""
    places = zip(state["index"].tolist(), state["count"].tolist(), strict=True)
    for param, value, place in zip(params, values, places, strict=True):
        if param.dtype == torch.bfloat16:
            value = stochastic_bfloat16(value.contiguous(), seeded(seed, *place, 1, device=param.device))
        param.copy_(value)


def whole(direction: Direction) -> Tensor:
    """Return the direction of one parameter as a tensor of its shape."""
    return direction.formed()[0] if isinstance(direction, Factors) else direction


def written(param: Tensor, direction: Direction, keep: float, factor: float, generator: Generator) -> None:
    """Write a step into one parameter; bfloat16 is rounded at random."""
    if param.dtype == torch.bfloat16:
        value = param.float().mul_(keep).add_(whole(direction), alpha=factor)
        param.copy_(stochastic_bfloat16(value, generator))
    else:
        Nearest()([param], [direction], keep, factor, {})
