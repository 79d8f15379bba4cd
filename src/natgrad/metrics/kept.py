"""The rows of the present step's batches, kept for a representation that is made of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, StepError
from natgrad.metrics.average import Weight
from natgrad.metrics.base import Observation
from natgrad.operators import FactoredRows, ParameterSpace
from natgrad.operators.layerrows import BatchRows
from natgrad.tape.passes import SignalPass
from natgrad.tape.replay import Replay, total_product
from natgrad.tape.rows import batch_rows

Rows = dict[str, Tensor]


class KeptRows:
    """F of the batches of one step as factored rows, and as products that run the model where rows take too much.

    An average over steps is not kept: rows of different steps don't join.

    Args:
        parameters: what the rows are about.
        memory: how many bytes rows may take before a batch that can be replayed is; None for no limit.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], memory: float | None = None) -> None:
        self._parameters = dict(parameters)
        self._space = ParameterSpace.of(parameters)
        self._memory = memory
        self._rows: list[tuple[BatchRows, float]] = []  # with what each counts
        self._replays: list[tuple[Replay, float]] = []
        self._weight = Weight()
        self._bytes = 0

    def add(self, observation: Observation) -> None:
        """A micro-batch; the first one of a step takes the place of all that was there."""
        if observation.first:
            self._rows, self._replays, self._bytes, self._weight = [], [], 0, Weight()
        held: list[SignalPass] = []
        replay = observation.replay
        for one in observation.passes:
            held.append(one)
            if replay is not None and self._better_replayed(held):
                self._replays.append((replay, observation.numerator))
                held = []
                break
        if held:
            rows = batch_rows(held, self._parameters)
            self._bytes += rows.nbytes
            self._rows.append((rows, observation.numerator))
        self._weight.add(observation.denominator(observation.first), 1.0)

    def _better_replayed(self, passes: list[SignalPass]) -> bool:
        """Whether signals take too much memory, or parameters that no rule covers would need a pass an example."""
        tape = passes[0].tape
        if self._memory is None:  # rows are wanted, whatever they take
            return False
        if self._bytes + len(passes) * tape.column_bytes > self._memory:
            return True
        return not all(tape.covers(name) for name in self._parameters)

    def factored(self) -> FactoredRows | None:
        """J of the batches that are kept, with every average's weight inside; None if there is none.

        Raises:
            StepError: nothing was observed yet.
        """
        if not self._weight.total:
            raise StepError("no rows were observed yet: run a forward pass and the loss before step()")
        if not self._rows and self._replays:
            return None
        batches = [
            dataclasses.replace(rows, scale=(counts / self._weight.total) ** 0.5)
            for rows, counts in self._rows
        ]
        return FactoredRows(self._space, tuple(batches or [self._zero()]))

    def _zero(self) -> BatchRows:
        """The row of batches that had no signal."""
        name, parameter = next(iter(self._parameters.items()))
        return BatchRows(1, 1, (), {name: torch.zeros_like(parameter)[None, None]})

    def product(self) -> Callable[[Rows], Rows] | None:
        """The product with what the batches that are replayed add to F; None if there is none."""
        if not self._replays:
            return None
        return total_product(
            [replay for replay, _ in self._replays],
            [counts / self._weight.total for _, counts in self._replays],
        )


def check_memory(memory: float) -> None:
    """Raises ConfigError unless it is a number of bytes."""
    if not memory >= 0:
        raise ConfigError(f"memory={memory} must be a number of bytes, such as 2**30")
