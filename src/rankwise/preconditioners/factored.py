"""What methods with Kronecker factors have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.preconditioner import Damping, Preconditioner, damping_at, every_step
from ..linalg import Sharing, exact, expanded, reduced


@dataclass(frozen=True, kw_only=True)
class Factored(Preconditioner):
    """Running averages of both factors, looked at every few steps and decomposed more seldom.

    Args:
        damping: in units of squared gradients of single samples, or of the positions that their losses are means
            over where a step is told their number; or a function of the step.
        every: steps between two decompositions, a multiple of ``factors_every``.
        factors_every: steps between two looks at the samples.
        early: how many steps at the beginning decompose after each look, whatever ``every`` says.
        decay: of running averages, for each look.
        sharing: of samples with several positions, :func:`rankwise.linalg.expanded` or ``reduced``.
        largest_side: of a layer above which a factor is replaced by its diagonal.
        identity_start: begin averages at the identity.
    """

    damping: Damping = 0.1
    every: int = 10
    factors_every: int = 1
    early: int = 10
    decay: float = 0.95
    sharing: Sharing = expanded
    largest_side: int = 8192
    identity_start: bool = False

    def __post_init__(self) -> None:
        damping_at(self.damping, 0)
        if self.sharing is exact:
            raise ValueError("factors need one position per row; take sharing=expanded or reduced.")
        every_step(self.factors_every, "factors_every")
        every_step(self.every)
        if self.every % self.factors_every:
            raise ValueError(
                f"every must be a multiple of factors_every, {self.factors_every}, as inversions follow looks at "
                f"the samples; got {self.every}."
            )
        if self.early < 0:
            raise ValueError(f"early must be >= 0, got {self.early}.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be >= 0 and < 1, got {self.decay}.")
        every_step(self.largest_side, "largest_side")

    def captures(self, step: int) -> bool:
        """At the first of every few steps."""
        return step % self.factors_every == 0

    def inverts(self, step: int) -> bool:
        """At the first of every few steps, and as long as it is early."""
        return step < self.early or step % self.every == 0

    @property
    def reduces(self) -> bool:
        """Where samples are shared so."""
        return self.sharing is reduced

    def cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        """n^3 + m^3 multiplications, n for a diagonal."""
        sides = [side for shape in shapes for side in shape]
        return float(sum(side**3 if side <= self.largest_side else side for side in sides))
