"""Ways to represent the Fisher information, and to average it over steps."""

from natgrad.metrics.base import Estimate, Kind, Metric, Observation
from natgrad.metrics.dense import Dense
from natgrad.metrics.diagonal import Diagonal
from natgrad.metrics.euclidean import Euclidean
from natgrad.metrics.kfac import KFAC
from natgrad.metrics.named import metric_from

__all__ = [
    "KFAC",
    "Dense",
    "Diagonal",
    "Estimate",
    "Euclidean",
    "Kind",
    "Metric",
    "Observation",
    "metric_from",
]
