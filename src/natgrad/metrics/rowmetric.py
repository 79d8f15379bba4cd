"""F = JᵀJ by the rows J of the present step: what the metrics that differ only in how they solve share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from natgrad.linalg import Stage
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, WholeEstimate, check_kind
from natgrad.metrics.kept import KeptRows
from natgrad.operators import FactoredRows, Gram, RowOperator


@dataclass(frozen=True)
class RowMetric(Metric):
    """F of the present batch, exactly, as an operator on its rows. Rows of different steps don't join: no average.

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
    """

    kind: Kind = "exact"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    @abc.abstractmethod
    def operator(self, rows: FactoredRows) -> RowOperator:
        """The operator of given rows."""

    @final
    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the whole matrix."""
        return RowEstimate(parameters, self.kind, self.operator)


class RowEstimate(WholeEstimate):
    """F of the present step's batches as an operator on their rows.

    Args:
        parameters: what the rows are about.
        kind: which signals make them.
        build: the operator of given rows.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        kind: Kind,
        build: Callable[[FactoredRows], RowOperator],
    ) -> None:
        super().__init__(parameters)
        self.kind = kind
        self._build = build
        self._kept = KeptRows(parameters)
        self._operator: RowOperator | None = None
        self._restricted: RowOperator | None = None

    def observe(self, observation: Observation) -> None:
        self._operator = self._restricted = None
        self._kept.add(observation)

    def operator(self) -> RowOperator:
        if self._operator is None:
            rows = self._kept.factored()
            assert rows is not None  # nothing is replayed where memory has no limit
            self._operator = self._build(rows)
        return self._operator

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        names = tuple(name for name in self.space.names if name in gradient)
        operator = self._on(names)
        solution = operator.solve({name: gradient[name] for name in names}, damping)
        self.note(operator, damping)
        return dict(solution)

    def _on(self, names: tuple[str, ...]) -> RowOperator:
        """F on some of the parameters: what it keeps, it keeps for as long as the rows and the names are the same."""
        if names == self.space.names:
            return self.operator()
        if self._restricted is None or self._restricted.space.names != names:
            self._restricted = self.operator()._restricted(names)
        return self._restricted

    def note(self, operator: RowOperator, damping: float) -> None:
        """Keeps which stage of the fallback a solution with an operator of these rows took."""
        stage = Stage.CHOLESKY
        if isinstance(operator, Gram):
            stage = operator.stage(damping)
        self.stages = {} if stage is Stage.CHOLESKY else {operator.space.label: {"JJᵀ": stage.value}}

    def state_dict(self) -> dict[str, Any]:
        return {}  # each step begins anew

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept, self._operator, self._restricted = KeptRows(self.parameters), None, None
