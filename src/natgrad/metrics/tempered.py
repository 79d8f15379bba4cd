"""EKFAC as it suits many noisy steps: between the gradient and the natural gradient."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.metrics.base import Kind
from natgrad.metrics.ekfac import EKFAC


@dataclass(frozen=True)
class Tempered(EKFAC):
    """Δ = −(F̂ + λI)^(−2/3) ∇h with EKFAC's basis, and the second moments of real gradients in it.

    Where a batch tells little of each direction, the natural gradient spends its steps on noise: it takes directions
    of low curvature, where a gradient is mostly chance, as far as those of high curvature. A power p < 1 takes them
    less far; Amari et al. 2021 (arXiv 2006.10732) study such preconditioners between identity and Fisher information.
    With real gradients' second moments a gradient cannot be much larger than F̂'s root, so that Δ grows by no more than
    the power −⅙ of F̂ + λ where both get small.

    With it the optimiser's own step size is `AdaptiveStep.tempered()` and its λ 1e-6, above float32's rounding, where
    the user gives none. Under autocast in bfloat16 give ``damping=1e-4``, or directions without any Fisher information,
    such as a constant added to all logits, take part of the step.
    For classifiers and language models on mini-batches; where a loss is to be driven down with large batches
    or residuals, ``"kfac"`` and ``"exact"`` are better by far.
    """

    kind: Kind = "empirical"
    power: float = 2 / 3
