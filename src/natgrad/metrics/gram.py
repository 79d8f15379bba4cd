"""The exact Fisher information of few examples and any number of parameters, through their Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from natgrad.metrics.base import Estimate, Kind, Metric, check_kind
from natgrad.metrics.rowestimate import RowEstimate
from natgrad.operators import Gram as GramOperator


@dataclass(frozen=True)
class Gram(Metric):
    """F = JᵀJ of the present batch, solved by one Cholesky factorisation of JJᵀ + λI.

    JJᵀ has a row for each example and output column ("exact"), or for each example ("mc", "empirical"); it is built
    layer by layer, and J is never formed. Rows of different steps don't join, so there is no average over steps.

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
    """

    kind: Kind = "exact"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the whole matrix."""
        return RowEstimate(parameters, self.kind, GramOperator)
