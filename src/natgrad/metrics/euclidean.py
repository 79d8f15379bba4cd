"""The Euclidean metric, F = I: plain gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from natgrad.metrics.base import Estimate, Metric, Observation
from natgrad.operators import LinearOperator, ScaledIdentity


@dataclass(frozen=True)
class Euclidean(Metric):
    """F = I. The natural gradient is the gradient, whatever the damping; no curvature is computed."""

    by_layer = True

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate that never changes."""
        return _Identity(parameters)


class _Identity(Estimate):
    whole = True

    def covers(self, name: str) -> bool:
        return name in self.parameters

    def due(self, step: int) -> bool:
        return False

    def observe(self, observation: Observation) -> None:
        pass

    def operator(self) -> LinearOperator:
        first = next(iter(self.parameters.values()))
        return ScaledIdentity(self.space, 1.0, dtype=first.dtype, device=first.device)

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        return dict(gradient)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
