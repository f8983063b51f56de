"""A budget of ranks over all layers that falls while they train (AdaLoRA)."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budgets import BudgetSettings, FallingBudget, scores_of
from ..core.methods import Course, check_count
from ..matrices import Dense, Diagonal, Product, StructuredMatrix


@dataclass(frozen=True)
class Triplets:
    """P (m, r), the diagonal e (r,) and Q (r, n) of P diag(e) Q: r triplets of two vectors and a number."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: StructuredMatrix) -> "Triplets":
        """Read the parameters of a product.

        Raises:
            ValueError: if the matrix has another form.
        """
        parts = matrix.parts if isinstance(matrix, Product) else []
        if [type(part) for part in parts] != [Dense, Diagonal, Dense]:
            raise ValueError("TripletBudget acts on a Product of a Dense, a Diagonal and a Dense.")
        left, values, right = (next(part.parameters()) for part in parts)
        return cls(left, values, right)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The three parameters by name."""
        return ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))


@dataclass(frozen=True, kw_only=True)
class TripletSettings(BudgetSettings):
    """The fields of :class:`TripletBudget`, which the adapter has, too."""

    target: int = 8
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("target", self.target)
        if not 0 <= self.orthogonality < float("inf"):
            raise ValueError(f"orthogonality must be >= 0, got {self.orthogonality!r}.")


@dataclass(frozen=True, kw_only=True)
class TripletBudget(TripletSettings, FallingBudget):
    """Keep those triplets of all layers for which the loss is sensitive; fewer and fewer, by a cubic law.

    The sensitivity of a number p is |p dL/dp|. Its running mean times the running mean of its distance from that
    mean is the number's score. A triplet's score is that of its value, plus the mean scores of its two vectors.
    Where the budget is b, all but the b largest scores of all layers together lose their value, which is set to
    zero: its gradient goes on, so that it may come back. In the tail what was dropped stays so.

    Vectors are drawn towards orthonormal ones: the gradient of ``orthogonality`` times the mean of |Q Q' - I| and
    |P' P - I| over all layers (Frobenius norms) is added once a step, to whatever the loss is. The scores see it,
    as in the published code, and clipping by the training loop does not.

    Layers whose values ask for no gradient stay as they are: they have no scores, and the regulariser and the
    budget leave them out.

    Args:
        target: average number of triplets of a layer that trains in the end; the start is what these have.
        warmup: share of the steps before the budget falls, in [0, 1).
        tail: share of the steps after it fell, in [0, 1).
        every: steps between two choices.
        sensitivity: how much a running mean of sensitivities keeps, in [0, 1).
        uncertainty: how much a running mean of distances keeps, in [0, 1).
        orthogonality: what the mean distance from orthonormal vectors counts.

    References: Zhang et al., "Adaptive budget allocation for parameter-efficient fine-tuning", ICLR 2023,
        arXiv 2303.10512. Norms are not squared and averaged, as in the published code. Exactly b triplets are
        left where scores are equal, as all are at first.
    """

    def check(self, matrix: StructuredMatrix) -> None:
        """Raise unless it is a product of triplets."""
        Triplets.of(matrix)

    @torch.no_grad()
    def before(self, course: Course) -> None:
        """Add the gradient of the regulariser; then take the sensitivities in."""
        layers = _layers(course)
        for name, triplets in layers.items():
            self._regularise(triplets, 2 * len(layers))
            if course.done < self.last(course.steps):
                self.observe(triplets.named(), course.state.setdefault(name, {}))

    @torch.no_grad()
    def after(self, course: Course) -> None:
        """Set values to zero."""
        layers, end = _layers(course), self.last(course.steps)
        if not layers:
            return
        first = sum(len(triplets.values) for triplets in layers.values())
        last = min(first, self.target * len(layers))
        if self.chooses(course):
            kept = _largest(_scores(layers, course.state), self.budget(course.done, course.steps, first, last))
            for name, triplets in layers.items():
                triplets.values[~kept[name]] = 0
                if course.done == end:
                    course.state[name] = {"kept": kept[name]}
        elif course.done > end:
            for name, triplets in layers.items():
                kept = course.state.get(name, {}).get("kept")
                if kept is not None:  # its values trained at the last choice
                    triplets.values[~kept] = 0

    def finished(self, matrix: StructuredMatrix) -> StructuredMatrix | None:
        """Keep the triplets whose values are not zero."""
        triplets = Triplets.of(matrix)
        kept = triplets.values.detach() != 0
        if not bool(kept.any()):
            return None
        left, values, right = (tensor.detach() for _, tensor in triplets.named())
        return Product(Dense(left[:, kept]), Diagonal(values[kept]), Dense(right[kept]))

    def _regularise(self, triplets: Triplets, count: int) -> None:
        """Add the gradient of ``orthogonality / count`` times the sum of both distances."""
        if self.orthogonality == 0:
            return
        for rows, turned in ((triplets.right, False), (triplets.left, True)):
            if not rows.requires_grad:
                continue
            vectors = rows.mT if turned else rows
            off = vectors @ vectors.mT
            off.diagonal().sub_(1)
            norm = off.norm().clamp_min(torch.finfo(off.dtype).tiny)
            slope = (2 * self.orthogonality / count / norm) * (off @ vectors)
            slope = slope.mT if turned else slope
            rows.grad = slope.clone() if rows.grad is None else rows.grad.add_(slope)


def _layers(course: Course) -> dict[str, Triplets]:
    """The layers whose values train."""
    layers = {name: Triplets.of(matrix) for name, matrix in course.matrices.items()}
    return {name: triplets for name, triplets in layers.items() if triplets.values.requires_grad}


def _scores(layers: Mapping[str, Triplets], state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """(r,) for each layer."""
    scores = {}
    for name, triplets in layers.items():
        each = {part: scores_of(name, part, state[name]) for part, _ in triplets.named()}
        scores[name] = each["values"] + each["right"].mean(1) + each["left"].mean(0)
    return scores


def _largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Mark so many of the largest scores of all layers."""
    together = torch.cat([score.cpu() for score in scores.values()])
    kept = torch.zeros_like(together, dtype=torch.bool)
    kept[together.sort(descending=True, stable=True).indices[:count]] = True
    parts = kept.split([len(score) for score in scores.values()])
    return {name: part.to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)}
