"""Running averages of squared per-example scores: the diagonal of F, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.metrics.average import Weight, accumulate, decay_since
from natgrad.metrics.base import Observation


class RunningSquares:
    """Sums that decay from step to step, each with its own weight: a parameter need not act in every batch.

    Args:
        parameters: name → parameter.
        decay: ε, what a step leaves of the average.

    Attributes:
        totals: the sums of those that acted.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.totals: dict[str, Tensor] = {}
        self._weights: dict[str, Weight] = {}
        self._steps: dict[str, int] = {}  # when each was last observed
        self._observation: Observation | None = None
        self._seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.totals

    def begin(self, observation: Observation) -> None:
        """A micro-batch, whose squares follow."""
        self._observation, self._seen = observation, set()

    def add(self, name: str, squares: Tensor) -> None:
        """Σₙ of squared scores of one parameter over some of the micro-batch's signal passes."""
        observation = self._observation
        assert observation is not None
        decay = 1.0  # further columns of one micro-batch join what is there
        if name not in self._seen:
            first = observation.first or self._steps.get(name) != observation.step
            decay = decay_since(self._decay, self._steps.get(name), observation.step)
            self.totals.setdefault(name, torch.zeros_like(self._parameters[name]))
            self._weights.setdefault(name, Weight()).add(observation.denominator(first), decay)
            self._steps[name] = observation.step
            self._seen.add(name)
        accumulate(
            self.totals[name], squares.reshape(self._parameters[name].shape), decay, observation.numerator
        )

    def averages(self) -> dict[str, Tensor]:
        """The diagonal of F, by parameter; new tensors."""
        return {
            name: self.totals[name] / self._weights[name].total for name in self._parameters if name in self
        }

    def state_dict(self) -> dict[str, Any]:
        """Sums, weights and steps."""
        return {
            "totals": dict(self.totals),
            "weights": {name: weight.total for name, weight in self._weights.items()},
            "steps": dict(self._steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.totals = {name: total.clone() for name, total in state["totals"].items()}
        self._weights = {name: Weight(total) for name, total in state["weights"].items()}
        self._steps = dict(state["steps"])
