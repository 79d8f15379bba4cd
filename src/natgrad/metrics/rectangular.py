"""The exact Fisher information of problems small enough that J fits, with nothing squared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from natgrad.metrics.base import Estimate, Kind, Metric, check_kind
from natgrad.metrics.rowestimate import RowEstimate
from natgrad.operators import Rectangular as RectangularOperator


@dataclass(frozen=True)
class Rectangular(Metric):
    """F = JᵀJ of the present batch, solved by the singular values of J itself.

    JᵀJ has the square of J's condition number, which floors the error of a differential equation's solution near 1e-6
    in float64. Through J it falls to 1e-10.

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
    """

    kind: Kind = "exact"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the whole matrix."""
        return RowEstimate(parameters, self.kind, RectangularOperator)
