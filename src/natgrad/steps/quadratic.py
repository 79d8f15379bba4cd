"""The quadratic model of the loss around θ, restricted to the few directions that a step may combine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class QuadraticModel:
    """M(δ) = h(θ) + ∇hᵀδ + ½ δᵀ(F + λI)δ for δ = Σ_k c_k d_k, with the exact Fisher information F of a batch.

    Martens & Grosse 2015, §6.4 and §7 (their eq. for α and μ is the case of two directions).

    Attributes:
        loss: h(θ), in nats.
        linear: ∇hᵀd_k.
        fisher: d_jᵀ F d_k.
        damping: d_jᵀ (λ + η) d_k.
    """

    loss: float
    linear: Float[Tensor, "K"]
    fisher: Float[Tensor, "K K"]
    damping: Float[Tensor, "K K"]

    @property
    def curvature(self) -> Float[Tensor, "K K"]:
        """d_jᵀ (F + (λ+η)I) d_k."""
        return self.fisher + self.damping

    @property
    def promise(self) -> float:
        """By how much M can fall without its damping, in nats."""
        undamped = replace(self, damping=torch.zeros_like(self.damping))
        return -undamped.change(undamped.minimise())

    def minimise(self, fixed: dict[int, float] | None = None) -> Float[Tensor, "K"]:
        """The coefficients that minimise M; those in `fixed` keep their value.

        Directions that are zero, or that rounding makes dependent, get no weight: the system is scaled to a unit
        diagonal and solved with a relative ridge of 1e-6.
        """
        fixed = fixed or {}
        size = len(self.linear)
        free = [k for k in range(size) if k not in fixed]
        c = torch.zeros(size, dtype=torch.float64)
        for k, value in fixed.items():
            c[k] = value
        if not free:
            return c
        slope = (self.linear + self.curvature @ c)[free]
        Q = self.curvature[free][:, free]
        scale = Q.diagonal()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale)).rsqrt()
        system = Q * scale[:, None] * scale + 1e-6 * torch.eye(len(free), dtype=torch.float64)
        c[free] = -scale * torch.linalg.solve(system, slope * scale)
        return c

    def change(self, c: Float[Tensor, "K"]) -> float:
        """M(δ) − M(0), in nats."""
        return float(self.linear @ c + 0.5 * c @ self.curvature @ c)

    def fisher_norm(self, c: Float[Tensor, "K"]) -> float:
        """‖δ‖_F = √(δᵀFδ)."""
        return max(0.0, float(c @ self.fisher @ c)) ** 0.5
