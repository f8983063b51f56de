"""Eigenvalues and eigenvectors of positive semi-definite matrices that may be hard to decompose."""

import torch
from torch import Tensor


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (n,), none below zero, and the eigenvectors, columns of (n, n).

    What float32 cannot decompose is decomposed in float64.

    Args:
        matrix: (n, n), positive semi-definite but for rounding; its symmetric part is taken.

    Raises:
        ValueError: if the matrix is not finite.
        ArithmeticError: if float64 cannot decompose it either.

    >>> symmetric_eigen(torch.diag(torch.tensor([4.0, -1e-9])))[0]
    tensor([0., 4.])
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError("the matrix is not finite.")
    symmetric = (matrix + matrix.mT) / 2
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        try:
            values, vectors = torch.linalg.eigh(symmetric.to(dtype))
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage] (documented)
            continue
        if bool(values.isfinite().all() & vectors.isfinite().all()):
            return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)
    raise ArithmeticError(f"no eigenvectors of a matrix {tuple(matrix.shape)} were found.")
