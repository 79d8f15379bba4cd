"""The trust region of a policy: as far as a bound on the divergence allows, and no farther than it improves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from natgrad.errors import ConfigError

# A length that only the divergence forbids is followed by what its square law predicts, less this margin.
MARGIN = 0.97


@dataclass(frozen=True)
class Trial:
    """What a step of some length does, measured.

    Attributes:
        change: of the surrogate loss; negative where it improves.
        divergence: the mean of KL(π_old ‖ π_new) over states, in nats.
    """

    change: float
    divergence: float


@dataclass(frozen=True)
class TrustRegion:
    """δ = αΔ with mean KL(π_old ‖ π_new) ≤ κ, as trust region policy optimisation has it.

    α begins at √(2κ / ΔᵀFΔ), where the divergence is κ to second order, and shrinks until the measured divergence is
    at most κ and the surrogate loss improves (Schulman et al. 2015, arXiv 1502.05477, Appendix C). Where the divergence
    alone is too large, the next α is the one at which it should be κ, if that is more than `shrink` of the last: to
    second order it goes with α². If no length is accepted the parameters stay.

    Attributes:
        kl: κ, in nats per state.
        backtracks: how many shorter lengths are tried after the first.
        shrink: what a backtrack leaves of α.
        accept: a step's improvement must be more than this part of what the gradient promises, as in Schulman's code
            (`accept_ratio`); 0 is the paper's rule, any improvement at all.
    """

    kl: float = 0.01  # δ in Schulman et al. 2015
    backtracks: int = 10
    shrink: float = 0.5
    accept: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.kl) and self.kl > 0):
            raise ConfigError(f"kl={self.kl} must be finite and positive")
        if self.backtracks < 0:
            raise ConfigError(f"backtracks={self.backtracks} must be at least 0")
        if not 0 < self.shrink < 1:
            raise ConfigError(f"shrink={self.shrink} must lie in (0, 1)")
        if not 0 <= self.accept < 1:
            raise ConfigError(f"accept={self.accept} must lie in [0, 1)")

    def search(
        self, slope: float, curvature: float, attempt: Callable[[float], Trial | None]
    ) -> tuple[float, Trial | None]:
        """The length α of the step, and what it does.

        Args:
            slope: ∇hᵀΔ of the surrogate loss h.
            curvature: ΔᵀFΔ, in nats per state.
            attempt: measures the step αΔ; None where it is not finite.

        Returns:
            (0, None) where no length was accepted.
        """
        if not (slope < 0 < curvature):  # no state tells the actions apart, or nothing moves the policy
            return 0.0, None
        alpha = math.sqrt(2 * self.kl / curvature)
        for _ in range(self.backtracks + 1):
            trial = attempt(alpha)
            improves = trial is not None and trial.change < self.accept * alpha * slope
            if trial is not None and improves and trial.divergence <= self.kl:
                return alpha, trial
            factor = self.shrink
            if trial is not None and improves:
                factor = max(factor, MARGIN * math.sqrt(self.kl / trial.divergence))
            alpha *= factor
        return 0.0, None
