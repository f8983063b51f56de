"""Attention whose Lipschitz constant on bounded inputs is known."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class BoundedAttention(nn.Module):
    """Attention with logits q k' scale / h, for heads of width h, and outputs divided by 3.

    Each head has layers of its own for queries, keys and values, since a bound needs the norm of each. In the
    norm of the largest root mean square of a row, with inputs of norm up to a and layers of norms q, k, v and o,
    it stretches by at most (v + 2 a^2 q k v scale) o / 3: by one, if all of these are one.

    Args:
        width: of inputs and outputs.
        heads: how many; they divide the width.
        scale: of the logits.
        causal: whether rows see only themselves and those before.

    Raises:
        ValueError: if the heads do not divide the width.

    References: Newhouse et al., 2025, arXiv 2507.13338; the bound is derived in :mod:`rankwise.certificate`.
    """

    def __init__(self, width: int, heads: int, *, scale: float = 1.0, causal: bool = True) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide width {width}, got {heads}.")
        self.width, self.heads, self.scale, self.causal = width, heads, scale, causal
        self.query, self.key, self.value = (
            nn.ModuleList(nn.Linear(width, width // heads, bias=False) for _ in range(heads)) for _ in range(3)
        )
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., t, n) -> (..., t, n)."""
        parts = self.query, self.key, self.value
        q, k, v = (torch.stack([head(x) for head in part], dim=-3) for part in parts)  # (..., heads, t, h)
        scale = self.scale / (self.width // self.heads)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=scale)
        return self.output(y.transpose(-3, -2).flatten(-2)) / 3

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"width={self.width}, heads={self.heads}, scale={self.scale}, causal={self.causal}"
