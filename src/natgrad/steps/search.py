"""Gauss–Newton from any start: damping, a second-order correction, and a search along the curve that it bends."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.steps.problem import Decision, LeastSquares, half_square, predicted_change

# A second derivative along v is taken over this part of v.
PROBE = 0.1
# The correction ½t²a is left out where ‖ta‖ is more than so many times ‖v‖: there the curve is no expansion.
BENT = 1.5
# After so many rungs of the ladder that led nowhere the next ones are farther apart, up to the largest eigenvalue of F
# and somewhat more: a step for which nothing lowers the loss ends after a few values of λ.
RUNGS, FARTHER, GREATEST = 3, 3, 100.0


@dataclass(frozen=True)
class CurvedSearch:
    """The step for residuals that stay the same: as long a step as lowers the loss, down to rounding.

    The direction v = −(F + λI)⁻¹Jᵀr is bent by a = −(F + λI)⁻¹Jᵀr″, where r″ is the second derivative of r along v
    (geodesic acceleration: Transtrum & Sethna 2012, "Improvements to the Levenberg–Marquardt algorithm for nonlinear
    least-squares minimization", arXiv 1201.5885, §4), and the loss is searched along θ + tv + ½t²a by halving t.

    λ is the least of a ladder, from a rung below the last step's upwards, for which t ≥ `shortest`. A greedy λ, with
    the lowest loss after each step, ends in narrow valleys and crawls; long steps that lower the loss by little pass
    them by. A step for which nothing lowers the loss leaves λ as it was. Where the metric knows the singular values of
    J, small ones are left out rather than damped (`order`).

    Attributes:
        initial: the first λ, in the largest eigenvalue of F.
        shortest: the least t.
        rung: the ladder's factor, of λ.
        order: how sharply singular values below √λ are left out, where they are known.
        floor: the least λ, in the largest eigenvalue of F: the square of what J's rounding leaves.
    """

    initial: float = 1e-4
    shortest: float = 0.01
    rung: float = 100.0
    order: float = 2.0
    floor: float = 1e-20

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= 1:
            raise ConfigError(f"shortest={self.shortest} must lie in (0, 1]")
        if not self.rung > 1:
            raise ConfigError(f"rung={self.rung} must be more than 1")
        if not self.order >= 1:
            raise ConfigError(f"order={self.order} must be at least 1")

    def decide(
        self, problem: LeastSquares, damping: float | None, previous: Float[Tensor, "P"] | None
    ) -> Decision:
        """The lowest point of the curve of the least λ that goes far enough.

        Args:
            problem: the present step's.
            damping: λ that the last step left, or None in the first.
            previous: δ₀; not used.
        """
        trial = _Trial(problem, self.order if problem.sharp else 1.0, self.shortest)
        largest = problem.largest
        floor = self.floor if problem.sharp else max(self.floor, torch.finfo(problem.residuals.dtype).eps)
        last = self.initial * largest if damping is None else damping
        damping, count = max(last / self.rung, floor * largest), 0
        while not trial.along(damping) and damping < GREATEST * largest:
            count += 1
            damping *= self.rung if count <= RUNGS else self.rung**FARTHER
            damping = min(damping, GREATEST * largest)
        return trial.decision(last)


class _Trial:
    """What the search of one step found so far."""

    def __init__(self, problem: LeastSquares, order: float, shortest: float) -> None:
        self._problem, self._order, self._shortest = problem, order, shortest
        self._loss = half_square(problem.residuals)
        self._lowest, self._length, self._damping = self._loss, 0.0, math.nan
        self._update: Tensor | None = None

    def along(self, damping: float) -> bool:
        """Searches one λ's curve; whether a step of fair length lowers the loss."""
        r, problem = self._problem.residuals, self._problem
        v = -problem.solve(r, damping, self._order)
        if not bool(torch.isfinite(v.sum())):
            return False
        a, reach = torch.zeros_like(v), math.inf
        tip = problem.at(PROBE * v)
        if tip is not None:
            second = 2 / PROBE * ((tip - r) / PROBE - problem.image(v))
            a = -problem.solve(second, damping, self._order)
            reach = BENT * float(v.norm()) / max(float(a.norm()), torch.finfo(a.dtype).tiny)
        lowest, length, update = self._loss, 0.0, None
        t = 1.0
        while t > self._shortest / 2:
            candidate = t * v + 0.5 * t * t * a if t <= reach else t * v
            loss = half_square(problem.at(candidate))
            if loss < lowest:
                lowest, length, update = loss, t, candidate
            elif update is not None:
                break
            t /= 2
        if update is not None and (length >= self._shortest or lowest < self._lowest):
            self._lowest, self._length, self._update, self._damping = lowest, length, update, damping
        return length >= self._shortest

    def decision(self, last: float) -> Decision:
        """The best step that was found; where there is none, λ stays at its last value."""
        if self._update is None:
            return Decision(None, 0.0, last, last)
        predicted = predicted_change(self._problem.residuals, self._problem.image(self._update))
        return Decision(
            self._update, self._length, self._damping, self._damping, loss=self._lowest, predicted=predicted
        )
