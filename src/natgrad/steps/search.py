"""Gauss–Newton from any start: damping, a second-order correction, and a search along the curve that it bends."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.steps.problem import Decision, LeastSquares


@dataclass(frozen=True)
class CurvedSearch:
    """Levenberg–Marquardt with geodesic acceleration and a backtracking search.

    The direction v = −(F + λI)⁻¹Jᵀr is bent by a = −(F + λI)⁻¹Jᵀr″, where r″ is the second derivative of r along v
    (Transtrum & Sethna 2012, "Improvements to the Levenberg–Marquardt algorithm for nonlinear least-squares
    minimization", arXiv 1201.5885, §4), and the loss is searched along θ + tv + ½t²a. λ is the least of a ladder for
    which a step of fair length lowers the loss: long steps are better than greedy ones, which end in narrow valleys.
    """

    shortest: float = 0.01
    ladder: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= 1:
            raise ConfigError(f"shortest={self.shortest} must lie in (0, 1]")

    def decide(
        self, problem: LeastSquares, damping: float | None, previous: Float[Tensor, "P"] | None
    ) -> Decision:
        """The best point of the search.

        Args:
            problem: the present step's.
            damping: λ that the last step left, or None in the first.
            previous: δ₀; not used.
        """
        r = problem.residuals
        loss = 0.5 * float(r @ r)
        evaluations = 0
        largest = _largest(problem)
        damping = 1e-4 * largest if damping is None else max(damping / self.ladder, 1e-20 * largest)
        direction = r.new_zeros(0)
        while damping <= 1e3 * largest:
            v = -problem.solve(r, damping)
            direction = v
            tip = problem.at(0.1 * v)
            evaluations += 1
            a = None
            if tip is not None:
                second = 20.0 * ((tip - r) * 10.0 - problem.image(v))
                a = -problem.solve(second, damping)
                limit = 1.5 * float(v.norm()) / max(float(a.norm()), 1e-300)
            t, best, point = 1.0, loss, None
            while t > self.shortest / 2:
                candidate = t * v + 0.5 * t * t * a if a is not None and t <= limit else t * v
                after = problem.at(candidate)
                evaluations += 1
                height = float("inf") if after is None else 0.5 * float(after @ after)
                if height < best:
                    best, point, length = height, candidate, t
                elif point is not None:
                    break
                t /= 2
            if point is not None:
                image = problem.image(point)
                return Decision(
                    point,
                    point,
                    length,
                    damping,
                    damping,
                    best,
                    float(r @ image) + 0.5 * float(image @ image),
                    evaluations,
                )
            damping *= self.ladder
        return Decision(None, direction, 0.0, damping, damping, evaluations=evaluations)


def _largest(problem: LeastSquares) -> float:
    """About the largest eigenvalue of F: its Rayleigh quotient along the gradient."""
    g = problem.gradient()
    image = problem.image(g)
    return float(image @ image) / float(g @ g)
