"""Systems with a multiple of the identity plus few outer products."""

import torch
from torch import Tensor

from .symmetric_eigen import symmetric_eigen


def damped_root(kernel: Tensor, damping: float) -> Tensor:
    """Return a lower triangular L with L L' = K + damping I for positive semi-definite kernels K (..., R, R).

    Eigenvalues of K that rounding made negative count as zero where they would outweigh the damping.

    Raises:
        ValueError: if damping is not positive, or the kernel is not finite.

    >>> import torch
    >>> damped_root(torch.tensor([[3.0]]), 1.0)
    tensor([[2.]])
    """
    if not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}.")
    if not bool(kernel.isfinite().all()):
        raise ValueError("the kernel is not finite.")
    one = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    root, info = torch.linalg.cholesky_ex(kernel + damping * one)
    if not bool(info.any()):
        return root
    values, vectors = symmetric_eigen(kernel.double())
    upper = torch.linalg.qr((values + damping).sqrt()[..., None] * vectors.mT)[1]
    signs = upper.diagonal(dim1=-2, dim2=-1).sign()
    return (upper.mT * signs[..., None, :]).to(kernel.dtype)


def solve_root(root: Tensor, right: Tensor) -> Tensor:
    """Solve L L' x = b for b (R,)."""
    return torch.cholesky_solve(right[:, None], root)[:, 0]
