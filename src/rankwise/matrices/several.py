"""Several adapters around one matrix, of which some are in use."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from .base import StructuredMatrix
from .expressions import Scaled, Sum, beside_base
from .frozen import Base, put_base

Weights = Mapping[str, float]  # how much of what each adapter changes counts; those not named count nothing


class Rows:
    """Which adapters each row of a batch goes through; rows are the first axis of a layer's inputs.

    Args:
        rows: for each row its weights; none at all are the base alone.
        flat: whether inputs of two axes are such rows. Where tokens are sent to experts they need not be.
    """

    def __init__(self, rows: Sequence[Weights], flat: bool = True) -> None:
        self.rows, self.flat = tuple(dict(row) for row in rows), flat
        found: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for i, row in enumerate(self.rows):
            found.setdefault(tuple(row.items()), []).append(i)
        self._places = [(dict(items), places) for items, places in found.items()]
        self._groups: dict[torch.device, list[tuple[Weights, Tensor]]] = {}

    @property
    def names(self) -> set[str]:
        """The adapters that some row goes through."""
        return {name for row in self.rows for name in row}

    def groups(self, device: torch.device) -> list[tuple[Weights, Tensor]]:
        """Return the different weights, each with the numbers of its rows."""
        if device not in self._groups:
            self._groups[device] = [(w, torch.tensor(places, device=device)) for w, places in self._places]
        return self._groups[device]

    def check(self, shape: torch.Size, axes: int) -> None:
        """Raise ValueError unless inputs with so many axes before the last can be these rows."""
        if axes == 1 and not self.flat:
            raise ValueError(
                "this layer may be an expert, whose inputs are tokens of any row: no row can choose an adapter."
            )
        if axes < 1 or shape[0] != len(self.rows):
            raise ValueError(
                f"inputs of shape {tuple(shape)} reach a layer, but adapters are chosen for {len(self.rows)} "
                "rows, which must be their first axis: give one for each row of the batch; a search with k beams "
                "makes k of each."
            )


def without(choice: Weights | Rows, name: str) -> Weights | Rows:
    """Return weights or rows without an adapter."""
    if isinstance(choice, Rows):
        return Rows([{n: w for n, w in row.items() if n != name} for row in choice.rows], choice.flat)
    return {n: w for n, w in choice.items() if n != name}


class Several(StructuredMatrix):
    """One matrix with several adapters, as the ones in use leave it.

    With expressions E_i around the same base B and weights w_i it is B + sum_i w_i (E_i - B), of whatever kind
    the expressions are; one alone with weight 1 is E_i itself. Products compute B x once where an expression adds
    something to it. What is not in use neither computes nor trains.

    Args:
        base: B, (m, n).
        adapters: E_i by name; each one's bases come to stand around the same matrix.
        choice: their weights, or :class:`Rows`, with which there is no one matrix, only :meth:`forward` and
            :meth:`lookup`; they are not in the spec.

    >>> import torch
    >>> from rankwise.matrices import Dense
    >>> base = Base(Dense(torch.eye(2)))
    >>> poet, coder = (Sum(base, Dense(x * torch.ones(2, 2))) for x in (1.0, 4.0))
    >>> Several(base, {"poet": poet, "coder": coder}, {"poet": 0.5, "coder": 0.25}).dense().tolist()
    [[2.5, 1.5], [1.5, 2.5]]
    """

    def __init__(
        self, base: Base, adapters: Mapping[str, StructuredMatrix], choice: Weights | Rows | None = None
    ) -> None:
        super().__init__()
        if not isinstance(base, Base):
            raise TypeError(f"Several takes a Base, got {type(base).__name__}.")
        self.base, self.shape, self.members = base, base.shape, nn.ModuleList()
        self.names: list[str] = []
        self.rates: dict[str, float | None] = {}  # the learning rates that they suggest
        self.choice: Weights | Rows = {}
        self._trained: dict[str, set[str]] = {}  # of each adapter not in use, what trains when it is
        for name, expression in adapters.items():
            self.add(name, expression)
        self.use(choice or {})
        self.register_state_dict_post_hook(_only_once)
        self.register_load_state_dict_pre_hook(_everywhere)

    def add(self, name: str, expression: StructuredMatrix, rate: float | None = None) -> None:
        """Take up another adapter, which is not in use yet; ``rate`` is the learning rate that it suggests."""
        if not isinstance(name, str) or not name or name in self.names:
            raise ValueError(f"the name of an adapter is a word that no other one has, got {name!r}.")
        if not isinstance(expression, StructuredMatrix):
            raise TypeError(f"Several takes StructuredMatrix, got {type(expression).__name__}.")
        if expression.shape != self.shape or not any(isinstance(part, Base) for part in expression.modules()):
            raise ValueError(f"adapter {name!r}, {expression.shape}, is none of a {self.shape} matrix.")
        put_base(expression, self.base.matrix)
        self.names.append(name)
        self.members.append(expression)
        self.rates[name], self._trained[name] = rate, _training(expression)
        expression.requires_grad_(False).train(self.training)

    def remove(self, name: str) -> None:
        """Forget an adapter, in what is in use, too."""
        i = self.names.index(name)
        del self.names[i], self.members[i], self.rates[name], self._trained[name]
        self.choice = without(self.choice, name) if self.used else {}

    @property
    def adapters(self) -> dict[str, StructuredMatrix]:
        """The expressions by name."""
        return dict(zip(self.names, cast(list[StructuredMatrix], list(self.members)), strict=True))

    @property
    def used(self) -> dict[str, StructuredMatrix]:
        """Those in use."""
        wanted = self.choice.names if isinstance(self.choice, Rows) else self.choice
        return {name: expression for name, expression in self.adapters.items() if name in wanted}

    def idle(self) -> Iterator[nn.Module]:
        """Yield all parts of adapters that are not in use, but for the base."""
        under, used = {id(part) for part in self.base.modules()}, self.used
        for name, expression in self.adapters.items():
            if name not in used:
                yield from (part for part in expression.modules() if id(part) not in under)

    def remember(self) -> None:
        """Note what of the adapters in use trains, so that it does when they are in use again."""
        self._trained |= {name: _training(expression) for name, expression in self.used.items()}

    def use(self, choice: Weights | Rows) -> None:
        """Have other adapters in use; names that are not here count nothing."""
        self.choice = choice
        used = self.used
        if not used:
            self.choice = {}
        for name, expression in self.adapters.items():
            for key, parameter in expression.named_parameters():
                parameter.requires_grad_(name in used and key in self._trained[name])

    @property
    def rate(self) -> float | None:
        """The learning rate that all in use suggest, or None."""
        rates = {self.rates[name] for name in self.used}
        return rates.pop() if len(rates) == 1 else None

    def check_one(self) -> Weights:
        """Return the weights of all rows, or raise ValueError if each row has its own."""
        if isinstance(self.choice, Rows):
            raise ValueError("each row has its own adapter; choose one for all with rankwise.use first.")
        return self.choice

    @property
    def expression(self) -> StructuredMatrix:
        """What is in use, as an expression around the base, or the base; with rows there is none."""
        return self._expression(self.check_one())

    def _held(self, weights: Weights) -> dict[str, float]:
        known = self.adapters
        return {name: weight for name, weight in weights.items() if name in known}

    def _alone(self, weights: Weights) -> StructuredMatrix | None:
        """Return the base where nothing is in use, an adapter that counts once alone, or None for several."""
        held = self._held(weights)
        if not held:
            return self.base
        return self.adapters[next(iter(held))] if list(held.values()) == [1.0] else None

    def _expression(self, weights: Weights) -> StructuredMatrix:
        alone, known = self._alone(weights), self.adapters
        if alone is not None:
            return alone
        terms = (term for name, w in self._held(weights).items() for term in _terms(known[name], self.base, w))
        return Sum(self.base, *terms)

    def _in_turn(self) -> list[StructuredMatrix]:
        """What is in use, or what each row goes through."""
        rows = self.choice.rows if isinstance(self.choice, Rows) else [self.choice]
        return [self._expression(weights) for weights in rows]

    @property
    def rank(self) -> int:
        """That of what is in use, or the largest of all rows'."""
        return max(expression.rank for expression in self._in_turn())

    @property
    def macs(self) -> int:
        """Those of what is in use written as a sum, at most, or the largest of all rows'."""
        return max(expression.macs for expression in self._in_turn())

    @property
    def params(self) -> int:
        """Those of the base, once, and of all adapters."""
        return super().params + self.base.params - sum(t.numel() for t in self.base.state_dict().values())

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m); with rows the first axis is theirs."""
        if isinstance(self.choice, Rows):
            self.choice.check(x.shape, x.dim() - 1)
            return self._by_rows(x, self.choice)
        if (alone := self._alone(self.choice)) is not None:
            return alone(x)
        product = self.base(x)
        return product + self._added(self._held(self.choice), x, product)

    def affine(self, x: Tensor, bias: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""
        alone = None if isinstance(self.choice, Rows) else self._alone(self.choice)
        return super().affine(x, bias) if alone is None else alone.affine(x, bias)

    def _added(self, weights: Weights, x: Tensor, product: Tensor) -> Tensor:
        known = self.adapters
        first, *others = (w * known[name].added(x, product) for name, w in weights.items())
        for other in others:
            first = first + other
        return first

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """One product with the base for all rows, and each adapter on its own rows alone."""
        product = self.base(x)
        places, moved = [], []
        for weights, place in rows.groups(x.device):
            held = self._held(weights)
            if held:
                places.append(place)
                moved.append(self._added(held, x[place], product[place]).to(product.dtype))
        return product.index_add(0, torch.cat(places), torch.cat(moved)) if places else product

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""
        return self.expression.adjoint(y)

    def lookup(self, index: Tensor) -> Tensor:
        """(...) -> (..., m); with rows the first axis is theirs."""
        if not isinstance(self.choice, Rows):
            return self.expression.lookup(index)
        self.choice.check(index.shape, index.dim())
        groups = self.choice.groups(index.device)
        found = [self._expression(weights).lookup(index[place]) for weights, place in groups]
        order = torch.cat([place for _, place in groups])
        return torch.cat(found)[order.argsort()]

    def dense(self) -> Tensor:
        """(m, n)."""
        return self.expression.dense()

    def spec(self) -> dict[str, Any]:
        """Kind, the specs of the base and of all adapters, and the weights of those in use."""
        weights = {} if isinstance(self.choice, Rows) else dict(self.choice)
        adapters = {name: expression.spec() for name, expression in self.adapters.items()}
        return {"kind": "Several", "base": self.base.spec(), "adapters": adapters, "weights": weights}

    @classmethod
    def empty(cls, spec: Mapping[str, Any], **where: Any) -> Self:
        """The same around matrices that are not initialised."""
        from . import from_spec

        adapters, weights = spec.get("adapters"), spec.get("weights", {})
        if not isinstance(adapters, Mapping) or not is_weights(weights):
            raise ValueError("spec of Several needs 'adapters', specs by name, and 'weights', numbers by name.")
        base = from_spec(spec.get("base"), **where)
        if not isinstance(base, Base):
            raise ValueError("spec of Several needs 'base', a Base.")
        return cls(base, {name: from_spec(each, **where) for name, each in adapters.items()}, weights)

    def extra_repr(self) -> str:
        """Show the adapters, and what is in use."""
        choice = f"{len(self.choice.rows)} rows" if isinstance(self.choice, Rows) else dict(self.choice)
        return f"shape={self.shape}, adapters={self.names}, use={choice}"


def _bases(several: nn.Module, prefix: str) -> list[str]:
    """Return where the bases inside the adapters stand."""
    assert isinstance(several, Several)
    inside = several.members.named_modules(prefix=f"{prefix}members", remove_duplicate=False)
    return [f"{path}." for path, part in inside if isinstance(part, Base)]


def _only_once(several: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the base in a state under its own name alone."""
    bases = tuple(_bases(several, prefix))
    for key in [key for key in state if bases and key.startswith(bases)]:
        del state[key]


def _everywhere(several: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Have a state hold the base for all that stand around it."""
    own = {key.removeprefix(f"{prefix}base."): state[key] for key in state if key.startswith(f"{prefix}base.")}
    for path in _bases(several, prefix):
        state.update({f"{path}{key}": value for key, value in own.items()})


def is_weights(value: object) -> bool:
    """Whether these are finite numbers by name."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str)
        and isinstance(weight, (int, float))
        and not isinstance(weight, bool)
        and math.isfinite(weight)
        for name, weight in value.items()
    )


def _terms(expression: StructuredMatrix, base: Base, weight: float) -> list[StructuredMatrix]:
    """Return what adds up to w (E - B)."""
    if others := beside_base(expression):
        return [Scaled(others[0] if len(others) == 1 else Sum(*others), weight)]
    return [Scaled(expression, weight), Scaled(base, -weight)]


def _training(expression: StructuredMatrix) -> set[str]:
    return {name for name, parameter in expression.named_parameters() if parameter.requires_grad}
