"""SPRING: the previous step, projected into the least-squares problem of the present one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.steps.problem import Decision, LeastSquares


def projected(
    problem: LeastSquares, damping: float, momentum: float, previous: Float[Tensor, "P"] | None
) -> Float[Tensor, "P"]:
    """The minimiser δ of ‖Jδ + r‖² + λ‖δ − μδ₀‖².

    Args:
        problem: the present step's.
        damping: λ.
        momentum: μ.
        previous: δ₀, or None in the first step.
    """
    target = -problem.residuals
    if previous is None or momentum == 0:
        return problem.solve(target, damping)
    carried = momentum * previous
    return problem.solve(target - problem.image(carried), damping) + carried


@dataclass(frozen=True)
class SPRING:
    """δ minimises ‖Jδ + r‖² + λ‖δ − μδ₀‖², and the step is lr·δ.

    What the present points say about the step is taken from them, and the rest from the steps before: points that are
    drawn anew add up to an average. Goldshlager, Abrahamsen & Lin 2024 ("A Kaczmarz-inspired approach to accelerate the
    optimization of neural network wavefunctions", arXiv 2401.10190). Without momentum it is the Gauss–Newton step.

    Attributes:
        lr: what the step is multiplied by.
        momentum: μ.
        norm: the most that lr‖δ‖ may be; a step that is longer is shortened. None for no bound.
        corrected: divide the step by √(1 − μ²ᵗ), since δ₀ = 0 at the start (Guzmán-Cordero et al. 2025, "Improving
            energy natural gradient descent through Woodbury, momentum, and randomization", Algorithm 1).
    """

    lr: float
    momentum: float = 0.9
    norm: float | None = None
    corrected: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ConfigError(f"lr must be finite and at least 0; got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must lie in [0, 1)")
        if self.norm is not None and not self.norm > 0:
            raise ConfigError(f"norm={self.norm} must be positive, or None for no bound")

    def decide(
        self,
        problem: LeastSquares,
        damping: float,
        previous: Float[Tensor, "P"] | None,
        step: int,
    ) -> Decision:
        """The step lr·δ.

        Args:
            problem: the present step's.
            damping: λ.
            previous: δ₀, or None in the first step.
            step: how many steps were taken.
        """
        delta = projected(problem, damping, self.momentum, previous)
        alpha = self.lr
        if self.corrected and self.momentum:
            alpha /= math.sqrt(1 - self.momentum ** (2 * (step + 1)))
        if self.norm is not None and alpha * float(delta.norm()) > self.norm:
            alpha = self.norm / float(delta.norm())
        return Decision(alpha * delta, alpha, damping, damping, delta)
