"""The line search of energy natural gradient descent: every length of a logarithmic grid is tried, all together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.steps.problem import Decision, LeastSquares, half_square, predicted_change
from natgrad.steps.spring import projected


@dataclass(frozen=True)
class GridSearch:
    """δ of `SPRING`, as far as lowers the loss most, of the lengths 1, ½, ¼, … 2⁻³⁰.

    Müller & Zeinhofer 2023 ("Achieving high accuracy with PINNs via energy natural gradient descent", arXiv
    2302.13163), Algorithm 1. Up to some 700 residuals the lengths are evaluated together, where the closure can be
    batched (`torch.func.vmap`).
    λ is the optimiser's `damping`: a number, `natgrad.LevenbergMarquardt(…)` or `natgrad.NoiseFloor()`.

    Attributes:
        momentum: μ, as in `SPRING`; 0 is the paper's step.
        finest: the least length is 2 to the power of minus this.
    """

    momentum: float = 0.0
    finest: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must lie in [0, 1)")
        if self.finest < 0:
            raise ConfigError(f"finest={self.finest} must be at least 0")

    def decide(
        self, problem: LeastSquares, damping: float, previous: Float[Tensor, "P"] | None, step: int
    ) -> Decision:
        """The length of the lowest loss; no step where none is lower than the present one.

        Args:
            problem: the present step's.
            damping: λ.
            previous: δ₀, or None in the first step.
            step: how many steps were taken; not used.
        """
        delta = projected(problem, damping, self.momentum, previous)
        lengths = 0.5 ** torch.arange(self.finest + 1, dtype=delta.dtype, device=delta.device)
        losses = problem.along(delta, lengths)
        best = int(losses.argmin())
        length, loss = float(lengths[best]), float(losses[best])
        if not loss < half_square(problem.residuals):
            return Decision(None, 0.0, damping, damping)
        update = length * delta
        predicted = predicted_change(problem.residuals, problem.image(update))
        carried = delta if self.momentum else None
        return Decision(update, length, damping, damping, carried, loss=loss, predicted=predicted)
