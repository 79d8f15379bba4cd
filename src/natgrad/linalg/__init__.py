"""Plain tensors in, plain tensors out: factorisations, Gram products, iterations, and the only vec convention."""

from natgrad.linalg.factorise import (
    Stage,
    cholesky,
    cholesky_inverse,
    eigendecomposition,
    inverse_from_cholesky,
)
from natgrad.linalg.gram import accumulate_gram, symmetric_gram
from natgrad.linalg.iterate import Convergence, conjugate_gradients, minimal_residuals
from natgrad.linalg.kronecker import join, kronecker_dense, kronecker_matmul, map_sizes, split
from natgrad.linalg.lanczos import Eigenpairs, Lanczos, largest_eigenpairs
from natgrad.linalg.nystrom import Nystrom
from natgrad.linalg.stochastic import Estimated

__all__ = [
    "Convergence",
    "Eigenpairs",
    "Estimated",
    "Lanczos",
    "Nystrom",
    "Stage",
    "accumulate_gram",
    "cholesky",
    "cholesky_inverse",
    "conjugate_gradients",
    "eigendecomposition",
    "inverse_from_cholesky",
    "join",
    "kronecker_dense",
    "kronecker_matmul",
    "largest_eigenpairs",
    "map_sizes",
    "minimal_residuals",
    "split",
    "symmetric_gram",
]
