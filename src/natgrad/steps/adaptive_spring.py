"""SPRING without a learning rate: λ by how well the linearised residuals foretell the loss."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.steps.damping import NoiseFloor
from natgrad.steps.grid import GridSearch
from natgrad.steps.problem import Decision, LeastSquares, half_square, predicted_change

# A step may raise the loss by so much: with momentum, and with points that are drawn anew, the next one makes it good.
TOLERATED = 1.1
# After so many refusals in one step the momentum is let go.
REFUSALS = 3
# A search begins with λ at so many noise floors, and looks at lengths down to 2⁻¹².
LEAST, LENGTHS = NoiseFloor(1e4), GridSearch(finest=12)
# What a step of less than the whole length multiplies λ by, so that a whole one comes.
RISE = 1.5


@dataclass(frozen=True)
class AdaptiveSPRING:
    """The step for residuals whose points change, or are too many for singular values: δ of `SPRING`, taken whole.

    λ follows the Levenberg–Marquardt rule (Marquardt 1963), by the worse of two ratios of actual to predicted decrease:
    of the whole step δ, and of what the present points add to the momentum, from μδ₀ to δ. The first alone is blind
    where momentum leads, since a step may then be meant to raise this batch's loss; the second alone lets the momentum
    run away.

    Attributes:
        momentum: μ.
        initial: the first λ, in the largest eigenvalue of F; where a run begins by searching, the most that it is.
        factor: what λ is multiplied or divided by.
        trust: below the first of these ratios λ rises, above the second it falls.
        trials: the most values of λ in one step.
        corrected: take a second step from where the first ends, with the same J and λ (the chord method), where J's
            factorisation is at hand.
        searching: begin by searching, where J's factorisation is at hand.
    """

    momentum: float = 0.8
    initial: float = 1e-3
    factor: float = 3.0
    trust: tuple[float, float] = (0.25, 0.75)
    trials: int = 12
    corrected: bool = True
    searching: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must lie in [0, 1)")
        if not (self.factor > 1 and self.initial > 0 and self.trials > 0):
            raise ConfigError("factor must be more than 1, initial positive, and trials at least 1")

    def decide(
        self, problem: LeastSquares, damping: float | None, previous: Float[Tensor, "P"] | None
    ) -> Decision:
        """The step, with the first λ that the loss bears.

        Args:
            problem: the present step's.
            damping: λ that the last step left, or None in the first.
            previous: δ₀, or None, as it is until a search ends.
        """
        if previous is None and self.searching and problem.repeats:
            return self._search(problem, damping)
        r = problem.residuals
        loss = half_square(r)
        damping = self.initial * problem.largest if damping is None else damping
        carried = None if previous is None or not self.momentum else self.momentum * previous
        before = torch.zeros_like(r) if carried is None else problem.image(carried)
        base = loss if carried is None else half_square(problem.at(carried))
        for trial in range(self.trials):
            if trial == REFUSALS:  # the momentum may be to blame
                carried, before, base = None, torch.zeros_like(r), loss
            added = problem.solve(-(r + before), damping)
            delta = added if carried is None else added + carried
            image = problem.image(added)
            tip = problem.at(delta)
            after = half_square(tip)
            predicted = predicted_change(r, before + image)
            ratio = min(
                _ratio(after - base, predicted_change(r + before, image)),
                _whole_ratio(loss, after, predicted),
            )
            used = damping
            if not ratio >= self.trust[0]:
                damping *= self.factor
            elif ratio > self.trust[1]:
                damping /= self.factor
            if after < TOLERATED * loss:
                update = delta
                if self.corrected and problem.repeats and tip is not None:
                    second = problem.solve(-tip, used)
                    loss = half_square(problem.at(delta + second))
                    if loss < after:  # momentum goes on without it: it makes up for how the residuals bend
                        update, after = delta + second, loss
                        predicted = predicted_change(r, before + image + problem.image(second))
                return Decision(update, 1.0, used, damping, delta, after, predicted)
        return Decision(None, 0.0, used, damping, torch.zeros_like(problem.gradient()))

    def _search(self, problem: LeastSquares, damping: float | None) -> Decision:
        """The best length for the first λ that has one; momentum begins with a whole step that was foretold well."""
        r, largest = problem.residuals, problem.largest
        least = min(LEAST.of(largest, len(r), r.dtype), self.initial * largest)
        damping = least if damping is None else max(damping, least)
        for _ in range(self.trials):
            decision = LENGTHS.decide(problem, damping, None, 0)
            if decision.update is not None:
                break
            damping *= self.factor
        following = damping * RISE if decision.alpha < 1 else damping
        whole = decision.alpha == 1 and self._foretold(decision, half_square(r))
        return dataclasses.replace(
            decision, following=following, direction=decision.update if whole else None
        )

    def _foretold(self, decision: Decision, loss: float) -> bool:
        if decision.loss is None or decision.predicted is None:
            return False
        return _ratio(decision.loss - loss, decision.predicted) >= self.trust[0]


def _ratio(actual: float, predicted: float) -> float:
    """Actual over predicted change, both negative where all is well; −1 where there is nothing to go by."""
    return actual / predicted if predicted < 0 and math.isfinite(actual) else -1.0


def _whole_ratio(loss: float, after: float, predicted: float) -> float:
    """The ratio of the whole step; where momentum foretells a rise, how little of it there is."""
    if predicted < 0:
        return _ratio(after - loss, predicted)
    if after < loss:
        return 1.0
    return 0.5 if after < TOLERATED * loss else -1.0
