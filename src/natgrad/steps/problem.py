"""What a strategy for least squares is given, and what it gives back."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class LeastSquares(abc.ABC):
    """r(θ + δ) ≈ r + Jδ in one step. Vectors δ are flat.

    Attributes:
        residuals: r, scaled so that the loss is ½‖r‖².
        sharp: whether the singular values of J are known, so that `solve` takes an order.
        repeats: whether one more solve with the last λ costs little beside the first.
    """

    residuals: Float[Tensor, "M"]
    sharp: bool = False
    repeats: bool = False

    @property
    @abc.abstractmethod
    def largest(self) -> float:
        """The largest eigenvalue of F, or about that."""

    @abc.abstractmethod
    def gradient(self) -> Float[Tensor, "P"]:
        """∇h = Jᵀr."""

    @abc.abstractmethod
    def image(self, delta: Float[Tensor, "P"]) -> Float[Tensor, "M"]:
        """Jδ."""

    @abc.abstractmethod
    def solve(self, target: Float[Tensor, "M"], damping: float, order: float = 1.0) -> Float[Tensor, "P"]:
        """(F + λI)⁻¹ Jᵀ target; F = JᵀJ, or what a metric makes of it.

        Args:
            target: the right-hand side of Jδ ≈ target.
            damping: λ.
            order: how sharply small singular values of J are left out, see `RowOperator.dual_solve`; of no effect for
                metrics that don't know them.
        """

    @abc.abstractmethod
    def at(self, delta: Float[Tensor, "P"]) -> Float[Tensor, "M"] | None:
        """r(θ + δ); None where it is not finite."""

    def along(self, delta: Float[Tensor, "P"], lengths: Float[Tensor, "K"]) -> Float[Tensor, "K"]:
        """½‖r(θ + tδ)‖² for several lengths t; infinite where it is not finite."""
        return torch.tensor([half_square(self.at(t * delta)) for t in lengths], dtype=delta.dtype)


@dataclass(frozen=True)
class Decision:
    """What a strategy decided.

    Attributes:
        update: δ; None where nothing that was tried lowers the loss.
        alpha: the length of the step, 1 for the whole of (F + λI)⁻¹∇h.
        damping: λ that the step was made with.
        following: λ for the next step.
        direction: what the next step's momentum goes on with; None for a strategy that has none.
        loss: ½‖r(θ+δ)‖², where it was measured.
        predicted: M(δ) − M(0), where it was.
    """

    update: Float[Tensor, "P"] | None
    alpha: float
    damping: float
    following: float
    direction: Float[Tensor, "P"] | None = None
    loss: float | None = None
    predicted: float | None = None


def half_square(residuals: Float[Tensor, "M"] | None) -> float:
    """½‖r‖², the loss; infinite where r is None, as `LeastSquares.at` has it where it is not finite."""
    return math.inf if residuals is None else 0.5 * float(residuals.square().sum())


def predicted_change(residuals: Float[Tensor, "M"], image: Float[Tensor, "M"]) -> float:
    """M(δ) − M(0) = r·Jδ + ½‖Jδ‖², of the Gauss–Newton model.

    Args:
        residuals: r.
        image: Jδ.
    """
    return float(residuals @ image) + 0.5 * float(image @ image)
