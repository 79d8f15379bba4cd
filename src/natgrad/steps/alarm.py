"""Noticing a step that went wrong by the next batch's loss."""

from __future__ import annotations

from dataclasses import dataclass

# How many mean deviations above the mean a loss must be, and the least deviation in parts of the mean. Batches differ,
# so that only a loss which no batch explains counts: at least 1.8 times the mean.
DEVIATIONS, LEAST, DECAY = 8.0, 0.1, 0.9


@dataclass(frozen=True)
class Alarm:
    """Running mean and mean deviation of the batches' losses.

    Where a network saturates the Fisher information vanishes, and a step that looks harmless to the quadratic model
    can go anywhere. ρ is measured on the same batch and only now and then; the next batch's loss is seen for free.

    Attributes:
        mean: of the losses, exponentially weighted.
        deviation: the mean of their distance from it.
        count: how many losses were seen.
    """

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def rings(self, loss: float) -> bool:
        """Whether this loss is beyond what the batches so far explain."""
        spread = max(self.deviation, LEAST * abs(self.mean))
        return self.count >= 5 and loss > self.mean + DEVIATIONS * spread

    def after(self, loss: float) -> Alarm:
        """With one more loss."""
        keep = min(DECAY, 1.0 - 1.0 / (self.count + 1))
        deviation = keep * self.deviation + (1.0 - keep) * abs(loss - self.mean) if self.count else 0.0
        return Alarm(keep * self.mean + (1.0 - keep) * loss, deviation, self.count + 1)
