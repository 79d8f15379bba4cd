"""What a step did, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepInfo:
    """Diagnostics of the last step.

    Attributes:
        step: how many steps were taken.
        loss: h(θ) before the step, in nats, or None where no loss was seen.
        damping: λ that the step was made with.
        alpha: α, the coefficient of −(F̂+λI)⁻¹∇h; the mean over layers where each had its own.
        momentum: μ, the coefficient of the last step.
        relaxation: the part of the quadratic model's minimiser that was taken.
        rho: ρ = actual ÷ predicted change, where it was measured.
        grad_norm: ‖∇h‖.
        step_norm: ‖δ‖_F = √(δᵀFδ) in √nats, where the exact Fisher information was used.
        predicted: M(δ) − M(0), in nats.
        actual: h(θ+δ) − h(θ) on the same batch, in nats, where it was measured.
        observed: whether curvature was observed in this step.
        undone: whether this step took the last one back, because the batch's loss was beyond what batches explain.
        skipped: how many steps were skipped so far because something was not finite.
        stages: block → factor → the stage of the fallback that its factorisation took, where not the first.
        solver: on residuals, what the step was solved with, such as "rectangular 1,020 × 257".
        rank: how many singular values of J are above √λ, where they are known.
        condition: the largest singular value of J over the least, where J or JJᵀ was factorised.
        stalled: on residuals, whether nothing that was tried lowered the loss, so that nothing moved.
        seconds: phase → seconds of this step.
    """

    step: int = 0
    loss: float | None = None
    damping: float = 0.0
    alpha: float = 0.0
    momentum: float = 0.0
    relaxation: float = 1.0
    rho: float | None = None
    grad_norm: float = 0.0
    step_norm: float | None = None
    predicted: float | None = None
    actual: float | None = None
    observed: bool = False
    undone: bool = False
    skipped: int = 0
    stages: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    solver: str = ""
    rank: int | None = None
    condition: float | None = None
    stalled: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
