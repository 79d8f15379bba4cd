"""The exact Fisher information of few examples and any number of parameters, through their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.metrics.rowmetric import RowMetric
from natgrad.operators import FactoredRows
from natgrad.operators import Gram as GramOperator


@dataclass(frozen=True)
class Gram(RowMetric):
    """F = JᵀJ of the present batch, solved by one Cholesky factorisation of JJᵀ + λI.

    JJᵀ has a row for each example and output column ("exact"), or for each example ("mc", "empirical"); it is built
    layer by layer, and J is never formed. Rows of different steps don't join, so there is no average over steps.

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
    """

    def operator(self, rows: FactoredRows) -> GramOperator:
        """Solves through JJᵀ, or JᵀJ where that is smaller."""
        return GramOperator(rows)
