"""Several methods at once: the allocator picks for each layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.choices import UNITS, Choices
from ..core.methods import Compressor
from ..core.statistics import Statistic, Stats
from ..matrices import StructuredMatrix
from .kronecker_factored_pruning import KroneckerFactoredPruning
from .kronecker_factored_rounding import KroneckerFactoredRounding
from .kronecker_factored_svd import KroneckerFactoredSvd
from .loss_metric import LossMetric


@dataclass(frozen=True, kw_only=True)
class Mixed(Compressor):
    """Offer for each layer what all of several methods offer.

    Args:
        methods: that measure errors by the same metric of the loss.

    References: the multiple-choice knapsack over structures is ROCKET's, arXiv 2602.11008; there the candidates
        are one structure's and the errors measured by layer outputs.
    """

    methods: tuple[LossMetric, ...] = (
        KroneckerFactoredSvd(),
        KroneckerFactoredPruning(),
        KroneckerFactoredRounding(),
    )
    needs: ClassVar[tuple[type[Statistic], ...]] = LossMetric.needs
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.methods or not all(isinstance(method, LossMetric) for method in self.methods):
            raise ValueError(f"methods must be some that measure errors by the loss, got {self.methods!r}.")
        if any(method.layers > 1 for method in self.methods):
            raise ValueError("the methods of a mix take one layer at a time; give all of them layers=1.")
        if len({(m.input_shrinkage, m.input_damping, m.output_damping) for m in self.methods}) > 1:
            raise ValueError(
                "the methods of a mix must have the same input_shrinkage, input_damping, output_damping."
            )

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer the choices of all methods."""
        offers = [method.choices(weight, stats) for method in self.methods]
        places = [(offer, i) for offer in offers for i in range(len(offer.errors))]

        def build(i: int) -> StructuredMatrix:
            offer, place = places[i]
            return offer.build(place)

        def refit(i: int, weight: Tensor, stats: Stats) -> StructuredMatrix:
            offer, place = places[i]
            return offer.refit(place, weight, stats)

        return Choices(
            costs={unit: torch.cat([offer.costs[unit] for offer in offers]) for unit in UNITS},
            errors=torch.cat([offer.errors for offer in offers]),
            total=offers[0].total,
            build=build,
            refit=refit,
            error_of=offers[0].error_of,
        )
