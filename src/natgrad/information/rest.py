"""What no rule of the tape covers: its exact diagonal, beside what a metric knows of the other parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from natgrad.metrics import Estimate, Observation
from natgrad.metrics.average import Weight
from natgrad.operators import BlockDiagonal, Diagonal, LinearOperator, ParameterSpace
from natgrad.tape.passes import SignalPass


class Rest:
    """The diagonal of F for some parameters, from per-example gradients.

    Args:
        parameters: name → parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._totals: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._weight, self._numerator = Weight(), 1.0

    def begin(self, observation: Observation) -> None:
        """Counts a batch, whose passes follow."""
        self._weight.add(observation.denominator(observation.first), 1.0)
        self._numerator = observation.numerator

    def observe(self, signal_pass: SignalPass) -> None:
        """Adds the squares of one pass's per-example gradients."""
        for _, scores in signal_pass.scores(self._parameters):
            for name, score in scores.items():
                self._totals[name].add_(score.square_().sum(0), alpha=self._numerator)

    def operator(self) -> Diagonal:
        """The diagonal."""
        values = {name: total / self._weight.total for name, total in self._totals.items()}
        return Diagonal(ParameterSpace.of(self._totals), values)


def joined(space: ParameterSpace, estimate: Estimate | None, rest: Rest | None) -> LinearOperator:
    """The operator on all parameters, in the order of the space: the estimate's, and the rest's beside it."""
    parts = [part.operator() for part in (estimate, rest) if part is not None]
    if len(parts) == 1 and parts[0].space == space:
        return parts[0]
    if all(isinstance(part, Diagonal) for part in parts):
        values = {name: d for part in parts for name, d in part._diagonal().items()}
        return Diagonal(space, {name: values[name] for name in space.names})
    blocks: list[LinearOperator] = []
    for part in parts:
        blocks += part.blocks if isinstance(part, BlockDiagonal) else [part]
    return BlockDiagonal(space, blocks)
