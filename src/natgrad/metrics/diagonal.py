"""The diagonal of the Fisher information: true, Monte-Carlo or empirical."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import StepError
from natgrad.metrics.average import Weight, accumulate, decay_since
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, check_decay, check_kind
from natgrad.metrics.refresh import Refresh
from natgrad.operators import Diagonal as DiagonalOperator
from natgrad.operators import LinearOperator
from natgrad.tape.finite import require_finite
from natgrad.tape.passes import SignalPass
from natgrad.tape.rows import layer_rows, portions

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

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_decay(self.decay)
        Refresh(self.refresh)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the diagonal for the linear maps and convolutions among the parameters."""
        return _DiagonalEstimate(self, parameters)


class _DiagonalEstimate(Estimate):
    def __init__(self, metric: Diagonal, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._metric = metric
        self.kind = metric.kind
        self._refresh = Refresh(metric.refresh)
        self._totals: dict[str, Tensor] = {}
        self._weights: dict[str, Weight] = {}
        self._steps: dict[str, int] = {}  # when each was last observed

    def covers(self, name: str) -> bool:
        return name in self._totals

    def due(self, step: int) -> bool:
        return self._refresh.due(step)

    def observe(self, observation: Observation) -> None:
        seen: set[str] = set()
        for passes in portions(observation.passes, COLUMN_BYTES):
            for name, value in self._squares(passes).items():
                # Further columns of an exact pass join what is there.
                decay = 1.0 if name in seen else self._begin(name, observation)
                seen.add(name)
                value = value.reshape(self.parameters[name].shape)
                accumulate(self._totals[name], value, decay, observation.numerator)
        self._refresh.took(observation.step)
        self._refresh.observed(self._totals)

    def _squares(self, passes: list[SignalPass]) -> dict[str, Tensor]:
        """Σₙ of squared scores over these columns, for all parameters that acted by a rule."""
        layers, rest = layer_rows(passes, self.parameters, partial=True)
        squares: dict[str, Tensor] = {}
        for layer in layers:
            squares |= layer.squares()
        # A map that acted on something that is not the batch: its scores are known by differentiation alone.
        acted = {name for block in passes[0].tape.blocks.values() for name in block.names}
        elsewhere = {name: self.parameters[name] for name in rest if name in acted}
        if elsewhere:
            for signal_pass in passes:
                for _, scores in signal_pass.scores(elsewhere):
                    for name, score in scores.items():
                        own = score.square_().sum(0)
                        squares[name] = squares[name] + own if name in squares else own
        require_finite(squares.items())
        return squares

    def _begin(self, name: str, observation: Observation) -> float:
        """Counts a micro-batch for a parameter, and says what remains of its old total."""
        first = observation.first or self._steps.get(name) != observation.step
        decay = decay_since(self._metric.decay, self._steps.get(name), observation.step)
        self._totals.setdefault(name, torch.zeros_like(self.parameters[name]))
        self._weights.setdefault(name, Weight()).add(observation.denominator(first), decay)
        self._steps[name] = observation.step
        return decay

    def _values(self) -> dict[str, Tensor]:
        if not self._totals:
            raise StepError(
                "the diagonal was not observed yet: run a forward pass and the loss before step()"
            )
        return {name: total / self._weights[name].total for name, total in self._totals.items()}

    def operator(self) -> LinearOperator:
        values = self._values()
        return DiagonalOperator(self.space.restrict(values), values)

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        values = self._values()
        if self._metric.root:
            values = {name: value.sqrt_() for name, value in values.items()}
        return {
            name: gradient[name] / value.add_(damping) for name, value in values.items() if name in gradient
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "totals": dict(self._totals),
            "weights": {name: weight.total for name, weight in self._weights.items()},
            "steps": dict(self._steps),
            "refresh": self._refresh.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._totals = {name: total.clone() for name, total in state["totals"].items()}
        self._weights = {name: Weight(total) for name, total in state["weights"].items()}
        self._steps = dict(state["steps"])
        self._refresh.load_state_dict(state["refresh"])
