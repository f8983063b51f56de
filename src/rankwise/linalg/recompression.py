"""The best matrix of a rank near a product of two factors of a larger one, without writing the product out."""

import torch
from torch import Tensor

from .metric import Metric


def recompressed(
    left: Tensor, right: Tensor, rank: int, outputs: Metric, inputs: Metric
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the best rank-r matrix in the metric tr(S D C D') of its difference D from L R.

    With S = T' T, C = K K', and A and B the triangles of the QR decompositions of T L and of (R K)', the singular
    values of T L R K are those of A B', which is small: (m + n) p^2 multiplications for p columns of L, after the
    metrics. As in :func:`rankwise.linalg.truncated_factors`, no inverse of K is needed.

    Args:
        left: L, (m, p).
        right: R, (p, n).
        rank: r, at most min(m, n, p).
        outputs: S (m, m), a diagonal, or the identity.
        inputs: C (n, n), a diagonal, or the identity.

    Returns:
        factors (m, r) and (r, n), and the singular values (min(m, n, p),) in the metric, all float64; those after
        the r-th are what is lost.

    >>> import torch
    >>> left, right = torch.eye(3)[:, :2], torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    >>> one, other, values = recompressed(left, right, 1, Metric(), Metric())
    >>> (one @ other).tolist(), values.tolist()
    ([[0.0, 3.0], [0.0, 0.0], [0.0, 0.0]], [3.0, 1.0])
    """
    right = right.double()
    basis, a = torch.linalg.qr(outputs.whiten(left.double()))
    b = torch.linalg.qr(inputs.whiten(right.mT), mode="r")[1]
    u, s, _ = torch.linalg.svd(a @ b.mT, full_matrices=False)
    u = u[:, :rank]
    return outputs.unwhiten(basis @ u), u.mT @ a @ right, s
