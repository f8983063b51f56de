"""Weights that are integers of 8 bits while they train.

A layer keeps codes, and writes its weight out for each product. What has a gradient is the change of the weight:
a parameter of its shape that is always zero and takes the memory of one number. An optimiser with
:class:`IntegerWeights` adds steps of that parameter to the codes.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..linalg import add_to_integers, integer_grid, seeded
from ..matrices import Quantized
from ..matrices.recomputed import product
from .directions import Direction
from .methods import check_count
from .states import State, counter
from .surgery import Where, select, set_module
from .writing import Write, put_at_random, whole, written

BITS = 8


class ChangingWeight(nn.Module):
    """A matrix of 8-bit integers and its change, which is zero.

    Args:
        weight: (m, n), rounded to the nearest; the change asks for a gradient if this does.
        group: how many neighbours in a row share a scale and an offset, in float32.
    """

    def __init__(self, weight: Tensor, group: int) -> None:
        super().__init__()
        check_count("group", group)
        m, n = weight.shape
        values = _grouped(weight.detach().float(), group)
        scale, offset = integer_grid(values)
        codes = ((values - offset[..., None]) / scale[..., None]).round_().clamp_(0, 255)
        codes = codes.flatten(1)[:, :n].byte()
        self.matrix = Quantized.from_codes(codes, scale, offset, bits=BITS, group=group)
        self.matrix.requires_grad_(False)
        self.change = nn.Parameter(weight.new_zeros(()).expand(m, n), requires_grad=weight.requires_grad)

    def dense(self) -> Tensor:
        """(m, n), in the type of the change."""
        return self.matrix.dense().to(self.change.dtype) + self.change

    def add(self, step: Tensor, keep: float, factor: float, generator: torch.Generator) -> None:
        """Write keep * W + factor * step (m, n), rounded at random."""
        matrix, n = self.matrix, self.matrix.shape[1]
        change = step.float() * factor
        if keep != 1:
            change.add_(matrix.dense(), alpha=keep - 1)
        codes, change = _grouped(matrix.packed[:, :n], matrix.group), _grouped(change, matrix.group)
        codes, scale, offset = add_to_integers(codes, matrix.scale, matrix.offset, change, generator)
        matrix.packed[:, :n] = codes.flatten(1)[:, :n]
        matrix.scale.copy_(scale)
        matrix.offset.copy_(offset)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ChangingWeight":
        """Move or convert; integers keep scales of float32, and the change its one number."""
        scales = [each.data for each in (self.matrix.scale, self.matrix.offset)]
        super()._apply(fn, recurse)
        for each, exact in zip((self.matrix.scale, self.matrix.offset), scales, strict=True):
            each.data = exact.to(each.device)
        self.change.data = self.change.data.new_zeros(()).expand(self.matrix.shape)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "ChangingWeight":
        """Copy all, but the change as one number."""
        made = memo[id(self)] = self.__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        made.change.data = made.change.data.new_zeros(()).expand(made.matrix.shape)
        return made

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Save no change, which is zero."""

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] (none is looked at)
        self, *args: object
    ) -> None:
        """Expect no change."""


def _grouped(values: Tensor, group: int) -> Tensor:
    """(m, n) -> (m, groups, group), with the last column repeated, which widens no range."""
    m, n = values.shape
    groups = -(-n // group)
    places = torch.arange(groups * group, device=values.device).clamp_max_(n - 1)
    return values[:, places].view(m, groups, group)


class IntegerLinear(nn.Module):
    """A linear layer whose weight trains as 8-bit integers; see :func:`train_as_integers`."""

    def __init__(self, layer: nn.Linear, group: int) -> None:
        super().__init__()
        self.integers, self.bias = ChangingWeight(layer.weight, group), layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., n) -> (..., m); the weight is written out, and again for the gradient."""
        made = product(self.integers, input)
        return made if self.bias is None else made + self.bias


def train_as_integers(model: nn.Module, where: Where | None = None, *, group: int = 256) -> int:
    """Round the weights of linear layers to 8-bit integers that train; frozen ones stay frozen.

    The optimiser needs ``write=IntegerWeights(model)``, and parameters that ask for gradients. Transforms that
    constrain weights cannot write these.

    >>> import rankwise
    >>> from rankwise.optimizers import q_galore
    >>> model = nn.Sequential(nn.Linear(256, 32, bias=False), nn.ReLU(), nn.Linear(32, 1))
    >>> train_as_integers(model, lambda name, layer: name == "0")
    1
    >>> trained = [p for p in model.parameters() if p.requires_grad]
    >>> optimizer = rankwise.Optimizer([(trained, q_galore(rank=4))], lr=0.01, write=IntegerWeights(model))
    >>> model(torch.ones(256)).square().sum().backward()
    >>> optimizer.step()

    Args:
        model: is changed.
        where: which layers; None means all but output heads. See :func:`rankwise.core.surgery.select`.
        group: how many neighbours in a row share a scale and an offset.

    Returns:
        how many layers there are now.

    Raises:
        ValueError: if no linear layer is chosen.
    """
    count = 0
    for site in select(model, where).values():
        if isinstance(site.layer, nn.Linear):
            layer, count = IntegerLinear(site.layer, group), count + 1
            for name in site.names:
                set_module(model, name, layer)
    if not count:
        raise ValueError("'where' accepts no linear layer; other layers cannot train as integers.")
    return count


def train_as_floats(model: nn.Module) -> None:
    """Make ordinary linear layers of those with integers, with the same values."""
    made: dict[IntegerLinear, nn.Linear] = {}
    for name, each in list(model.named_modules(remove_duplicate=False)):
        if isinstance(each, IntegerLinear):
            if each not in made:
                weight = nn.Parameter(each.integers.dense().detach(), each.integers.change.requires_grad)
                m, n = weight.shape
                made[each] = nn.Linear(n, m, bias=False, device="meta")
                made[each].weight, made[each].bias = weight, each.bias
            set_module(model, name, made[each])


class IntegerWeights(Write):
    """Writes steps into the integers of a model's layers, rounded at random; other parameters as usual.

    Bfloat16 parameters are rounded at random too. What an optimiser reads of parameters is the weights.

    Args:
        model: with layers of :func:`train_as_integers`.
        seed: of the random numbers, as for :class:`StochasticRounding`.

    References: the INT8 weights of Q-GaLore, Zhang et al., 2024, arXiv 2407.08296. There the grid of a group
    moves with each step, and groups of one sign are not reproduced.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        found = [each for each in model.modules() if isinstance(each, ChangingWeight)]
        self.weights: dict[Tensor, ChangingWeight] = {each.change: each for each in found}
        self.seed = seed
        if not self.weights:
            raise ValueError("the model has no layers with integers; call train_as_integers first.")

    def init(self, param: Tensor, index: Tensor) -> State:
        """The place of any parameter, and how often it was written."""
        return {"index": index.clone(), "count": counter(index)}

    def read(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Write out weights."""
        return [self.weights[param].dense() if param in self.weights else param for param in params]

    def put(self, params: Sequence[Tensor], values: Sequence[Tensor], state: State) -> None:
        """Write into parameters that are no integers; constraints of those are refused."""
        put_at_random(params, values, self.seed, state)

    def __call__(
        self, params: Sequence[Tensor], directions: Sequence[Direction], keep: float, factor: float, state: State
    ) -> None:
        """Add to codes, or to parameters."""
        seeds = zip(state["index"].tolist(), state["count"].add_(1).tolist(), strict=True)
        for param, direction, seed in zip(params, directions, seeds, strict=True):
            generator = seeded(self.seed, *seed, device=param.device)
            if param in self.weights:
                self.weights[param].add(whole(direction), keep, factor, generator)
            else:
                written(param, direction, keep, factor, generator)
