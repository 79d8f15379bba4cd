"""Representations of a symmetric positive semi-definite matrix on parameter space."""

from natgrad.operators.algebra import Damped, Sum
from natgrad.operators.base import LinearOperator
from natgrad.operators.blocks import BlockDiagonal
from natgrad.operators.dense import Dense
from natgrad.operators.diagonal import Diagonal
from natgrad.operators.factored import FactoredInverse
from natgrad.operators.identity import ScaledIdentity
from natgrad.operators.kronecker import Eigenbasis, Kronecker
from natgrad.operators.space import ParameterSpace

__all__ = [
    "BlockDiagonal",
    "Damped",
    "Dense",
    "Diagonal",
    "Eigenbasis",
    "FactoredInverse",
    "Kronecker",
    "LinearOperator",
    "ParameterSpace",
    "ScaledIdentity",
    "Sum",
]
