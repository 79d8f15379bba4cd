"""Derivatives of a network with respect to its inputs, for residuals of differential equations."""

from natgrad.pde.derivatives import Derivatives, derivatives
from natgrad.pde.operators import (
    advection,
    burgers,
    divergence,
    gradient,
    heat,
    helmholtz,
    laplacian,
    value_and_gradient,
    wave,
)

__all__ = [
    "Derivatives",
    "advection",
    "burgers",
    "derivatives",
    "divergence",
    "gradient",
    "heat",
    "helmholtz",
    "laplacian",
    "value_and_gradient",
    "wave",
]
