"""Adam on the cosine frequencies of the gradient."""

from ..core.subspaces import Carry, Projector, Refresh
from ..core.transforms import Transform
from ..projectors import Cosine, Rotate
from .adam import Adam
from .feedback import Feedback
from .project import project


def dct_adamw(
    *,
    rank: int | float,
    every: int | Refresh = 1,
    feedback: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    projector: Projector = Cosine(),  # noqa: B008 (frozen)
    carry: Carry = Rotate(),  # noqa: B008 (frozen)
) -> Transform:
    """DCT-AdamW: Adam on the strongest cosine frequencies of each gradient, which are chosen at each step.

    It is :func:`project` with parts of a fixed basis, found by a Fourier transform instead of a decomposition, so
    the state of a subspace is r whole numbers; with full rank it is Adam. It misses much where neighbouring rows
    have nothing in common, as those of most weights: compare ``LargestRows()`` (no transform at all) and
    ``WarmPower()`` as projectors, and see ``feedback``.

    >>> import torch
    >>> from rankwise.core.transforms import state_bytes
    >>> from rankwise.optimizers import galore
    >>> weight = torch.empty(64, 256, device="meta")
    >>> galore_bytes, dct_bytes = (state_bytes(each(rank=8), weight) for each in (galore, dct_adamw))
    >>> galore_bytes - dct_bytes  # 64 x 8 numbers against 8
    2000

    Args:
        rank: how many frequencies, or their share of the shorter side. Matrices with no longer side get Adam.
        every: steps between two choices, or a rule.
        feedback: add what is missed to the next gradient, in float32: a number for each entry of the matrix.
        betas: of Adam.
        eps: of Adam.
        projector: chooses; the rotation of its bases must be defined.
        carry: what becomes of moments. Those of frequencies that stay are kept, those of new ones begin with
            zero; as the steps of all are counted together, their first ones are up to 3 times longer than Adam's.
            The published code does ``Keep()`` by default, so that moments of one frequency go to another.

    References: Modoranu et al., "FFT-based dynamic subspace selection", 2025, arXiv 2505.17967. There the error
    may take 4 or 8 bits, frequencies are chosen by the sum of sizes, and squares are carried as they are; here
    they are at least those of the mean. DCT-FRUGAL is ``frugal(projector=Cosine())``, DCT-Fira
    ``fira(projector=Cosine())``.
    """
    rest = Feedback() if feedback else None
    return project(projector, Adam(betas=betas, eps=eps), rank=rank, every=every, carry=carry, rest=rest)
