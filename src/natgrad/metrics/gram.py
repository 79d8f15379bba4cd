"""The exact Fisher information of few examples and any number of parameters, through their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.errors import ConfigError
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
        precision: "full", or "mixed" for the step on residuals in float64: JJᵀ and its factorisation in float32, and as
            many products with J in float64 as make the solution exact to 2e-12 again; in full where the damping is too
            small for that.
    """

    precision: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in ("full", "mixed"):
            raise ConfigError(f"precision={self.precision!r} is neither 'full' nor 'mixed'")

    def operator(self, rows: FactoredRows) -> GramOperator:
        """Solves through JJᵀ, or JᵀJ where that is smaller."""
        return GramOperator(rows, self.precision)
