"""Low-bit integers, with the error of each column made up for by the later ones (GPTQ)."""

from dataclasses import dataclass

from .low_bit import Feedback


@dataclass(frozen=True, kw_only=True)
class Gptq(Feedback):
    """Round the weight to integers of few bits, so that the layer's outputs change little.

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
