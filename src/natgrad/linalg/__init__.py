"""Plain tensors in, plain tensors out: factorisations, Gram products, and the only vec convention."""

from natgrad.linalg.factorise import (
    Stage,
    cholesky,
    cholesky_inverse,
    eigendecomposition,
    inverse_from_cholesky,
)
from natgrad.linalg.gram import accumulate_gram, symmetric_gram
from natgrad.linalg.kronecker import join, kronecker_dense, kronecker_matmul, split
from natgrad.linalg.stochastic import Estimated

__all__ = [
    "Estimated",
    "Stage",
    "accumulate_gram",
    "cholesky",
    "cholesky_inverse",
    "eigendecomposition",
    "inverse_from_cholesky",
    "join",
    "kronecker_dense",
    "kronecker_matmul",
    "split",
    "symmetric_gram",
]
