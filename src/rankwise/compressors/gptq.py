"""Low-bit integers, with the error of each column made up for by the later ones (GPTQ)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.choices import Choices
from ..core.statistics import Stats
from ..linalg import metric_norm
from ..matrices import Quantized, StructuredMatrix
from .low_bit import LowBit


@dataclass(frozen=True, kw_only=True)
class Gptq(LowBit):
    """Round the weight to integers of few bits, so that the loss changes little.

    Codes are chosen in the metric C = E[x x'], column by column with feedback; the error reported, and weighed
    against other layers', is 1/2 tr(S D C D').

    Args:
        bits: 1 ... 8; None offers 2, 3, 4, 5, 6 and 8.
        group: how many columns of a row share a scale and an offset.
        feedback: whether later columns make up for the rounding of earlier ones; False rounds to nearest.
        input_shrinkage: see :class:`KroneckerFactoredSvd`.
        input_damping: see :class:`KroneckerFactoredSvd`.
        output_damping: see :class:`KroneckerFactoredSvd`.

    References: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
        Transformers", ICLR 2023, arXiv 2210.17323. Bits are shared out between layers by the allocator.
    """

    def choices(self, weight: Tensor, stats: Stats) -> Choices:
        """Offer several widths, or one."""
        m, n = weight.shape
        widths = [2, 3, 4, 5, 6, 8] if self.bits is None else [self.bits]
        metrics = self.metrics(stats)
        changes = [weight.double() - self.rounded(weight, metrics[1], bits).dense().double() for bits in widths]
        floats, codes = torch.tensor([Quantized.stored(m, n, bits, self.group) for bits in widths]).unbind(1)

        def build(i: int) -> StructuredMatrix:
            return self.quantized(self.rounded(weight, self.metrics(stats)[1], widths[i]), widths[i])

        return Choices(
            costs={
                "params": floats + m * n,
                "bytes": floats * weight.element_size() + codes,
                "macs": torch.full_like(floats, m * n),
            },
            errors=torch.tensor(
                [self.scale * metric_norm(change, *metrics) for change in changes], dtype=torch.float64
            ),
            total=self.scale * metric_norm(weight, *metrics),
            build=build,
            error_of=self.error_of(stats),
        )
