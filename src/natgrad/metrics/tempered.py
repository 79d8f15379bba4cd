"""EKFAC as it suits many noisy steps: between the gradient and the natural gradient.

Its basis is that of F's partial traces, made of the scores of whole examples. It is Shampoo's (Gupta et al. 2018, arXiv
1802.09568), in which SOAP runs Adam (Vyas et al. 2024, arXiv 2409.11321), but for their batches' mean scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.metrics.base import Kind
from natgrad.metrics.ekfac import EKFAC
from natgrad.metrics.factors import Sharing


@dataclass(frozen=True)
class Tempered(EKFAC):
    """Δ = −(F̂ + λI)^(−2/3) ∇h with the basis of F's partial traces, and the second moments of real gradients in it.

    Where a batch tells little of each direction, the natural gradient spends its steps on noise: it takes directions
    of low curvature, where a gradient is mostly chance, as far as those of high curvature. A power p < 1 takes them
    less far; Amari et al. 2021 (arXiv 2006.10732) study such preconditioners between identity and Fisher information.
    With real gradients' second moments a gradient cannot be much larger than F̂'s root, so that Δ grows by no more than
    the power −⅙ of F̂ + λ where both get small.

    Where positions share a weight, eight sums of scores with random signs stand for all of a batch. Along a side that
    has no basis but the coordinates, such as a vocabulary, a tenth of the mean second moment is added to each word's,
    so that a rare one does not go far for never having been seen.

    With it the optimiser's own step size is `AdaptiveStep.tempered()` and its λ 1e-7, above float32's rounding, where
    the user gives none. Under autocast in bfloat16 give ``damping=1e-4``, or directions without any Fisher information,
    such as a constant added to all logits, take part of the step.
    For classifiers and language models on mini-batches; where a loss is to be driven down with large batches
    or residuals, ``"kfac"`` and ``"exact"`` are better by far.
    """

    kind: Kind = "empirical"
    sharing: Sharing = "scores"
    power: float = 2 / 3
