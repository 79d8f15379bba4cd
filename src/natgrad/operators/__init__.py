"""Representations of a symmetric positive semi-definite matrix on parameter space."""

from natgrad.operators.algebra import Damped, Sum
from natgrad.operators.base import LinearOperator
from natgrad.operators.blocks import BlockDiagonal
from natgrad.operators.dense import Dense
from natgrad.operators.diagonal import Diagonal
from natgrad.operators.eigen import EigenKronecker
from natgrad.operators.factored import FactoredInverse
from natgrad.operators.gram import Gram
from natgrad.operators.identity import ScaledIdentity
from natgrad.operators.inverse import Inverse
from natgrad.operators.kronecker import Eigenbasis, Kronecker
from natgrad.operators.lowrank import LowRank
from natgrad.operators.matrixfree import MatrixFree
from natgrad.operators.rectangular import Rectangular
from natgrad.operators.restricted import Restricted
from natgrad.operators.rowoperator import RowOperator
from natgrad.operators.rows import FactoredRows
from natgrad.operators.saving import load_operator
from natgrad.operators.sketched import Sketched
from natgrad.operators.space import ParameterSpace

__all__ = [
    "BlockDiagonal",
    "Damped",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "Eigenbasis",
    "FactoredInverse",
    "FactoredRows",
    "Gram",
    "Inverse",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "MatrixFree",
    "ParameterSpace",
    "Rectangular",
    "Restricted",
    "RowOperator",
    "ScaledIdentity",
    "Sketched",
    "Sum",
    "load_operator",
]
