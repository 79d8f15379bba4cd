"""The exact Fisher information of few examples and any number of parameters, through their Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from natgrad.linalg import Stage
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, WholeEstimate, check_kind
from natgrad.metrics.kept import KeptRows
from natgrad.operators import Gram as GramOperator
from natgrad.operators import LinearOperator


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
        return _GramEstimate(self, parameters)


class _GramEstimate(WholeEstimate):
    def __init__(self, metric: Gram, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.kind = metric.kind
        self._kept = KeptRows(parameters)
        self._operator: GramOperator | None = None

    def observe(self, observation: Observation) -> None:
        self._operator = None
        self._kept.add(observation)

    def operator(self) -> LinearOperator:
        return self._gram()

    def _gram(self) -> GramOperator:
        if self._operator is None:
            rows = self._kept.factored()
            assert rows is not None  # nothing is replayed where memory has no limit
            self._operator = GramOperator(rows)
        return self._operator

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        operator = self._gram()
        names = [name for name in self.space.names if name in gradient]
        if len(names) < len(self.space.names):
            operator = GramOperator(operator.rows.restrict(names))
        solution = operator.solve({name: gradient[name] for name in names}, damping)
        _, stage = operator.cholesky(damping)
        self.stages = {} if stage is Stage.CHOLESKY else {self.space.label: {"JJᵀ": stage.value}}
        return dict(solution)

    def state_dict(self) -> dict[str, Any]:
        return {}  # each step begins anew

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept, self._operator = KeptRows(self.parameters), None
