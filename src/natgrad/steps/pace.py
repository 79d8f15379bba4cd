"""A step size out of several measurements, and how often one is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# What a mean keeps of itself at a measurement: it is over about the last (1 + KEEP)/(1 − KEEP) = 9 of them.
KEEP = 0.8
# The standard error of ln α below which measurements become rarer, and above which they become more frequent.
LOW, HIGH = 0.07, 0.15
# Steps from one measurement to the next: at most so many, and at most a quarter of all that were made.
LONGEST, YOUTH = 5, 4


@dataclass(frozen=True)
class Pace:
    """Running geometric means of α, one for each part of Δ.

    The α that minimises one slice's model is a noisy number: with few examples it differs by a factor of three from
    one batch to the next, where slope and curvature are both large for the same examples. What a network wants changes
    slowly, so the mean of the last few logarithms is nearer to it; and where these agree, every step need not measure.

    Attributes:
        logarithms: means of ln α; empty before the first measurement.
        spread: the mean squared distance of ln α of the first part from its mean.
        count: how many measurements there were.
        period: how many steps after a measurement the next one is due.
        last: the step of the last one.
    """

    logarithms: tuple[float, ...] = ()
    spread: float = 0.0
    count: int = 0
    period: int = 1
    last: int = 0

    @property
    def alphas(self) -> list[float]:
        """The means."""
        return [math.exp(value) for value in self.logarithms]

    def due(self, step: int, parts: int) -> bool:
        """Whether α has to be measured in this step, for so many parts of Δ."""
        return len(self.logarithms) != parts or step - self.last >= self.period

    def after(self, alphas: Sequence[float], step: int) -> Pace:
        """With one more measurement; a part whose α was not positive keeps its mean, and is 0 without one."""
        keep = min(KEEP, 1.0 - 1.0 / (self.count + 1))
        before = self.logarithms if len(self.logarithms) == len(alphas) else (-math.inf,) * len(alphas)
        pairs = list(zip(before, alphas, strict=True))
        logarithms = tuple(_mean(old, alpha, keep) for old, alpha in pairs)
        spread, (old, alpha) = self.spread, pairs[0]
        if alpha > 0 and math.isfinite(old):
            spread = keep * spread + (1.0 - keep) * (math.log(alpha) - old) ** 2
        error, period = math.sqrt(spread * (1.0 - KEEP) / (1.0 + KEEP)), self.period
        if error < LOW:
            period = max(1, min(2 * period, LONGEST, step // YOUTH))
        elif error > HIGH:
            period = max(1, period // 2)
        return Pace(logarithms, spread, self.count + 1, period, step)

    def slower(self, factor: float) -> Pace:
        """With every α less by a factor, and a measurement due at once."""
        return replace(self, logarithms=tuple(v - math.log(factor) for v in self.logarithms), period=1)


def _mean(old: float, alpha: float, keep: float) -> float:
    if not alpha > 0:
        return old
    return math.log(alpha) if math.isinf(old) else keep * old + (1.0 - keep) * math.log(alpha)
