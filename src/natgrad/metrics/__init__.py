"""Ways to represent the Fisher information, and to average it over steps."""

from natgrad.metrics.base import Estimate, Kind, Metric, Observation
from natgrad.metrics.block import Block
from natgrad.metrics.dense import Dense
from natgrad.metrics.diagonal import Diagonal
from natgrad.metrics.ekfac import EKFAC
from natgrad.metrics.euclidean import Euclidean
from natgrad.metrics.exact import Exact
from natgrad.metrics.gram import Gram
from natgrad.metrics.kfac import KFAC
from natgrad.metrics.lowrank import LowRank
from natgrad.metrics.matrixfree import MatrixFree
from natgrad.metrics.named import metric_from
from natgrad.metrics.rectangular import Rectangular
from natgrad.metrics.sketched import Sketched
from natgrad.metrics.tempered import Tempered

__all__ = [
    "EKFAC",
    "KFAC",
    "Block",
    "Dense",
    "Diagonal",
    "Estimate",
    "Euclidean",
    "Exact",
    "Gram",
    "Kind",
    "LowRank",
    "MatrixFree",
    "Metric",
    "Observation",
    "Rectangular",
    "Sketched",
    "Tempered",
    "metric_from",
]
