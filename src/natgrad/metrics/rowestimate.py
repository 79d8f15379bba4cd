"""Estimates of F = JᵀJ by the rows J of the present step: what the metrics that differ in how they solve share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from natgrad.linalg import Stage
from natgrad.metrics.base import Kind, Observation, WholeEstimate
from natgrad.metrics.kept import KeptRows
from natgrad.metrics.warm import warm_solve
from natgrad.operators import FactoredRows, Gram, LinearOperator, MatrixFree


class RowEstimate(WholeEstimate):
    """F of the present step's batches as an operator on its rows. Rows of different steps don't join.

    Args:
        parameters: what the rows are about.
        kind: which signals make them.
        build: the operator of given rows.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        kind: Kind,
        build: Callable[[FactoredRows], LinearOperator],
    ) -> None:
        super().__init__(parameters)
        self.kind = kind
        self._build = build
        self._kept = KeptRows(parameters)
        self._operator: LinearOperator | None = None
        self._last: dict[str, Tensor] = {}

    def observe(self, observation: Observation) -> None:
        self._operator = None
        self._kept.add(observation)

    def operator(self) -> LinearOperator:
        if self._operator is None:
            rows = self._kept.factored()
            assert rows is not None  # nothing is replayed where memory has no limit
            self._operator = self._build(rows)
        return self._operator

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        operator = self.operator()
        names = tuple(name for name in self.space.names if name in gradient)
        if len(names) < len(self.space.names):
            operator = operator._restricted(names)
        given = {name: gradient[name] for name in names}
        if isinstance(operator, MatrixFree):
            self._last, _ = warm_solve(operator, given, damping, self._last)
            return dict(self._last)
        solution = operator.solve(given, damping)
        stage = operator.cholesky(damping)[1] if isinstance(operator, Gram) else Stage.CHOLESKY
        self.stages = {} if stage is Stage.CHOLESKY else {self.space.label: {"JJᵀ": stage.value}}
        return dict(solution)

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)} if self._last else {}  # all else begins anew in each step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = {name: v.clone() for name, v in state.get("last", {}).items()}
        self._kept, self._operator = KeptRows(self.parameters), None
