"""Stochastic reconfiguration: the natural gradient of a sampled wave function's energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Inexact
from torch import Tensor

from natgrad.likelihoods import Scores


def reconfigure(
    log_psi: Callable[[Any], Inexact[Tensor, "N"]],
    samples: Any,
    local_energies: Inexact[Tensor, "N"],
    weights: Float[Tensor, "N"] | None = None,
) -> Callable[[], Scores]:
    """What to give to `step` in variational Monte Carlo: θ ← θ − lr (F + λI)⁻¹ Re⟨ΔO† ΔE⟩.

        optimizer = natgrad.NaturalGradient(log_psi, metric="exact", lr=0.05, damping=1e-4)
        optimizer.step(natgrad.reconfigure(log_psi, samples, local_energies))

    The step goes through the Gram matrix of the centred scores where there are fewer samples than parameters, and
    returns the energy. `momentum=` makes it SPRING. See `natgrad.Scores` for formulas and sources.

    Args:
        log_psi: the model: samples to log ψ, real or complex.
        samples: what it takes, drawn from |ψ|², or all states if `weights` are given.
        local_energies: ⟨x|H|ψ⟩ / ⟨x|ψ⟩ of each sample.
        weights: what each sample counts; equal if None.
    """
    return lambda: Scores(log_psi(samples), local_energies, weights)
