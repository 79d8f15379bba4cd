"""Scores of a sampled wave function, as the rows of a least-squares problem."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from natgrad.errors import NonFiniteError, OutputError
from natgrad.likelihoods.residualblock import WORKING, ResidualBlock, by_column


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Samples of a wave function ψ and what its energy is at each: one step of stochastic reconfiguration.

    With O = ∂ log ψ/∂θ and ΔO = O − ⟨O⟩, F = Re⟨ΔO† ΔO⟩ is the Fubini–Study metric (the real part of the quantum
    geometric tensor), half the energy's gradient is Re⟨ΔO† ΔE⟩, and the natural gradient step is that of the residuals
    ΔE in the Jacobian ΔO (Sorella 1998, Phys. Rev. Lett. 80, 4558; in the space of samples: Chen & Heyl 2024, arXiv
    2302.01941, and Rende et al. 2024, arXiv 2310.05715).

    Attributes:
        log_psi: log ψ(xₙ) with its graph: real, or complex with the phase as imaginary part.
        local_energies: E(xₙ) = ⟨xₙ|H|ψ⟩ / ⟨xₙ|ψ⟩.
        weights: what each sample counts, such as |ψ|² where all states are listed; equal if None.
    """

    log_psi: Tensor
    local_energies: Tensor
    weights: Tensor | None = None

    def block(self) -> ResidualBlock:
        """The least-squares problem of the step.

        Raises:
            OutputError: log ψ is not [N] with a graph, or the energies or weights don't fit it.
            NonFiniteError: a number is not finite.
        """
        z, E = self.log_psi, self.local_energies.detach()
        if z.dim() != 1 or z.dtype not in WORKING or not z.requires_grad:
            raise OutputError(
                f"log_psi must return log ψ [N] that depends on the parameters, in float32 or float64 or complex, not "
                f"{tuple(z.shape)} {z.dtype}{'' if z.requires_grad else ' without a graph'}"
            )
        if E.shape != z.shape or (self.weights is not None and self.weights.shape != z.shape) or len(z) < 2:
            raise OutputError(
                f"log ψ is {tuple(z.shape)}, the local energies are {tuple(E.shape)}; give both for each of "
                "two samples or more"
                + ("" if self.weights is None else f", and a weight, {tuple(self.weights.shape)}")
            )
        real = torch.view_as_real(z) if z.is_complex() else z[:, None]
        energies = torch.view_as_real(E) if E.is_complex() else E[:, None]
        energies = energies.to(real.dtype)
        if self.weights is None:
            share = real.detach().new_full((len(z),), 1 / len(z))
        else:
            share = self.weights.detach().to(real.dtype) / self.weights.sum().to(real.dtype)
        if not bool(torch.isfinite(real.detach().sum() + energies.sum() + share.sum())) or bool(
            (share < 0).any()
        ):
            raise NonFiniteError("log ψ, a local energy or a weight is not finite, or a weight is negative")
        mean = share @ energies
        root = share.sqrt()
        columns = real.shape[1]
        deviation = real.detach().new_zeros(len(z), columns)
        shared = min(columns, energies.shape[1])
        deviation[:, :shared] = ((energies - mean) * root[:, None])[:, :shared]
        removed = torch.block_diag(*[root[:, None]] * columns)
        values = real * root[:, None]
        return ResidualBlock("scores", values, by_column(deviation), removed, float(mean[0]))
