"""The diagonal of the Fisher information: true, Monte-Carlo or empirical."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from natgrad.errors import StepError
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, check_decay, check_kind
from natgrad.metrics.refresh import Refresh
from natgrad.metrics.runningsquares import RunningSquares
from natgrad.operators import Diagonal as DiagonalOperator
from natgrad.operators import LinearOperator
from natgrad.tape.finite import require_finite
from natgrad.tape.passes import SignalPass
from natgrad.tape.rows import explain, portions

# Signals of so many bytes, of as many output columns as that makes, are squared together.
COLUMN_BYTES = 2**28


@dataclass(frozen=True)
class Diagonal(Metric):
    """diag F: the mean of squared per-example scores, without their products across coordinates.

    Attributes:
        kind: the signals: sampled from the model ("mc"), every output column ("exact"), or real gradients
            ("empirical").
        decay: ε of the running average.
        refresh: observe every so many steps; adapted to how fast the diagonal moves if None.
        root: solve with the square root, (√F̂ + λ)⁻¹, as Adam does, rather than with (F̂ + λ)⁻¹.
    """

    kind: Kind = "mc"
    decay: float = 0.95
    refresh: int | None = 1
    root: bool = False
    by_layer = True

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_decay(self.decay)
        Refresh(self.refresh)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the diagonal for the parameters that a rule of the tape covers."""
        return _DiagonalEstimate(self, parameters)


class _DiagonalEstimate(Estimate):
    def __init__(self, metric: Diagonal, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._metric = metric
        self.kind = metric.kind
        self._refresh = Refresh(metric.refresh)
        self._squares = RunningSquares(self.parameters, metric.decay)

    def covers(self, name: str) -> bool:
        return name in self._squares

    def due(self, step: int) -> bool:
        return self._refresh.due(step)

    def observe(self, observation: Observation) -> None:
        self._squares.begin(observation)
        for passes in portions(observation.passes, COLUMN_BYTES):
            squares = self._squares_of(passes)
            require_finite(squares.items())
            for name, value in squares.items():
                self._squares.add(name, value)
        self._refresh.took(observation.step)
        self._refresh.observed(self._squares.totals)

    def _squares_of(self, passes: list[SignalPass]) -> dict[str, Tensor]:
        """Σₙ of squared scores over these columns, for all parameters that acted by a rule."""
        explained = explain(passes, self.parameters, partial=True)
        squares = explained.squares()
        # A map that acted on something that is not the batch: its scores are known by differentiation alone.
        acted = {name for block in passes[0].tape.blocks.values() for name in block.names}
        elsewhere = {name: self.parameters[name] for name in explained.rest if name in acted}
        if elsewhere:
            for signal_pass in passes:
                for name, own in signal_pass.squares(elsewhere).items():
                    squares[name] = squares[name] + own if name in squares else own
        return squares

    def _values(self) -> dict[str, Tensor]:
        if not self._squares.totals:
            raise StepError(
                "the diagonal was not observed yet: run a forward pass and the loss before step()"
            )
        return self._squares.averages()

    def operator(self) -> LinearOperator:
        values = self._values()
        return DiagonalOperator(self.space.restrict(values), values)

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        values = self._values()
        if self._metric.root:
            values = {name: value.sqrt_() for name, value in values.items()}
        return {
            name: gradient[name] / value.add_(self.damping_of(damping, value.mean()))
            for name, value in values.items()
            if name in gradient
        }

    def state_dict(self) -> dict[str, Any]:
        return {"squares": self._squares.state_dict(), "refresh": self._refresh.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._squares.load_state_dict(state["squares"])
        self._refresh.load_state_dict(state["refresh"])
