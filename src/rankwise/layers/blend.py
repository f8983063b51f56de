"""A residual connection whose two parts are weighted."""

from torch import Tensor, nn


class Blend(nn.Module):
    """Compute keep x + share block(x).

    With keep = 1 - share, a block that stretches nothing makes a whole that stretches nothing. In a network of
    l such blocks the share is 1 / l, so that a bound does not grow with depth. With 1 and 1 it is the usual
    residual.

    Args:
        block: takes and returns (..., n).
        share: of the block.
        keep: of the input; None means 1 - share.

    References: Newhouse et al., 2025, arXiv 2507.13338; Large et al., "Scalable optimization in the modular
        norm", 2024, arXiv 2405.14813.

    >>> import torch
    >>> Blend(nn.ReLU(), 0.25)(torch.tensor([-4.0, 4.0]))
    tensor([-3.,  4.])
    """

    def __init__(self, block: nn.Module, share: float, keep: float | None = None) -> None:
        super().__init__()
        self.block, self.share = block, share
        self.keep = 1 - share if keep is None else keep

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        return self.keep * x + self.share * self.block(x)

    def extra_repr(self) -> str:
        """Show both weights."""
        return f"keep={self.keep}, share={self.share}"
