"""How much of what a batch promised the next batch confirms."""

from __future__ import annotations

from dataclasses import dataclass

KEEP = 0.9


@dataclass(frozen=True)
class Promise:
    """What the model of one batch said of a step δ.

    Attributes:
        slope: ∇hᵀδ for the whole step that minimises the model, in nats.
        curvature: δᵀFδ for the step that was taken.
        taken: the part of the whole step that was taken.
    """

    slope: float
    curvature: float
    taken: float


@dataclass(frozen=True)
class Confirmation:
    """Running sums behind the part of a step's slope that holds for examples which had no say in it.

    A step that minimises a batch's model fits the batch's noise too. The next batch's gradient along the step that was
    taken is a slope at its end that owes nothing to that noise; less the curvature on the way it is the slope at its
    beginning, as a fresh batch sees it. It costs nothing: δ₀ is a direction of the next model anyway.

    Attributes:
        kept: the fresh slopes over the promised ones.
        promised: the parts of the whole steps that were taken.
        count: how many steps were seen.
    """

    kept: float = 0.0
    promised: float = 0.0
    count: int = 0

    @property
    def ratio(self) -> float:
        """Fresh slope over promised slope; 1 before anything was seen, and without noise."""
        return self.kept / self.promised if self.promised > 0 else 1.0

    def after(self, promise: Promise, slope: float) -> Confirmation:
        """With one more step.

        Args:
            promise: what was said of it.
            slope: ∇hᵀδ₀ of the next batch, at the step's end.
        """
        if not promise.slope < 0:
            return self
        keep = min(KEEP, 1.0 - 1.0 / (self.count + 1))
        kept = (slope - promise.curvature) / promise.slope
        # Without noise it is the part that was taken. Where a batch promised next to nothing the quotient has no bound.
        kept = min(promise.taken, max(-promise.taken, kept))
        return Confirmation(
            keep * self.kept + (1.0 - keep) * kept,
            keep * self.promised + (1.0 - keep) * promise.taken,
            self.count + 1,
        )
