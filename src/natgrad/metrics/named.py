"""Metrics by name."""

from __future__ import annotations

from natgrad.errors import ConfigError, UnknownNameError
from natgrad.metrics.base import Metric
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
from natgrad.metrics.rectangular import Rectangular
from natgrad.metrics.sketched import Sketched
from natgrad.metrics.tempered import Tempered

METRICS: dict[str, type[Metric]] = {
    "block": Block,
    "dense": Dense,
    "diagonal": Diagonal,
    "ekfac": EKFAC,
    "euclidean": Euclidean,
    "exact": Exact,
    "gram": Gram,
    "kfac": KFAC,
    "lowrank": LowRank,
    "matrixfree": MatrixFree,
    "rectangular": Rectangular,
    "sketched": Sketched,
    "tempered": Tempered,
}


def metric_from(metric: str | Metric) -> Metric:
    """A metric from its name, with its default options; a metric is returned as it is.

    Raises:
        UnknownNameError: no metric has this name; the message offers the nearest.
        ConfigError: neither a name nor a metric.
    """
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        raise ConfigError(f"metric must be a name or a natgrad metric such as natgrad.KFAC(), not {metric!r}")
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    return METRICS[metric]()
