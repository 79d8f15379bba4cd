"""What the steps themselves say about the metric, and so about λ."""

from __future__ import annotations

from dataclasses import dataclass

# What an average keeps of itself in a step.
KEEP = 0.8


@dataclass(frozen=True)
class Witness:
    """Running averages over the last few steps.

    Attributes:
        alpha: α. With F̂ = F and a noiseless slope it would be 1; it is Δᵀ(F̂+λI)Δ over Δᵀ(F+λI)Δ, the curvature that
            the metric expects along Δ over the true one, times what of Δ's gradient the next batch confirms.
        share: λ‖Δ‖² over Δᵀ(F+λI)Δ, from 0 to 1: how much of the curvature along Δ is damping already. Near 1 the step
            is plain gradient descent, and a larger λ would only shorten it.
    """

    alpha: float
    share: float = 0.0

    def after(self, alpha: float, share: float) -> Witness:
        """With one more step."""
        return Witness(
            KEEP * self.alpha + (1.0 - KEEP) * alpha,
            KEEP * self.share + (1.0 - KEEP) * share,
        )
