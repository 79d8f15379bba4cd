"""The exact Fisher information of problems small enough that J fits, with nothing squared."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.metrics.rowmetric import RowMetric
from natgrad.operators import FactoredRows
from natgrad.operators import Rectangular as RectangularOperator


@dataclass(frozen=True)
class Rectangular(RowMetric):
    """F = JᵀJ of the present batch, solved by the singular values of J itself.

    JᵀJ has the square of J's condition number, which floors the error of a differential equation's solution near 1e-6
    in float64. Through J it falls to 1e-10.

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
    """

    def operator(self, rows: FactoredRows) -> RectangularOperator:
        """Solves through J."""
        return RectangularOperator(rows)
