"""What no rule of the tape covers: its exact diagonal, beside what a metric knows of the other parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from natgrad.metrics import Estimate, Observation
from natgrad.metrics.runningsquares import RunningSquares
from natgrad.operators import BlockDiagonal, Diagonal, LinearOperator, ParameterSpace
from natgrad.tape.passes import SignalPass


class Rest:
    """The diagonal of F for some parameters, from per-example gradients.

    Args:
        parameters: name → parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._squares = RunningSquares(self._parameters, decay=0.0)  # all batches are of one step

    def begin(self, observation: Observation) -> None:
        """Counts a batch, whose passes follow."""
        self._squares.begin(observation)
        for name, p in self._parameters.items():  # a batch without a pass counts too
            self._squares.add(name, torch.zeros_like(p))

    def observe(self, signal_pass: SignalPass) -> None:
        """Adds the squares of one pass's per-example gradients."""
        for name, squares in signal_pass.squares(self._parameters).items():
            self._squares.add(name, squares)

    def operator(self) -> Diagonal:
        """The diagonal."""
        return Diagonal(ParameterSpace.of(self._parameters), self._squares.averages())


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
