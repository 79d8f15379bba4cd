"""The Fisher information layer by layer: dense blocks, nothing between layers. The yardstick for K-FAC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from natgrad.errors import StepError
from natgrad.linalg import Stage
from natgrad.metrics.average import Weight
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, WholeEstimate, check_decay, check_kind
from natgrad.metrics.dense import require_room
from natgrad.metrics.moments import Moments
from natgrad.operators import BlockDiagonal, LinearOperator
from natgrad.operators import Dense as DenseOperator
from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass


@dataclass(frozen=True)
class Block(Metric):
    """blockdiag(F): what the exact F has within each layer, which is what K-FAC approximates.

    A layer is what acts together as one (grouped) linear map; parameters that no rule of the tape covers are taken
    together by module, through their per-example gradients.

    Attributes:
        kind: "exact" sums over all output columns; "mc", "rademacher" and "empirical" take one signal an example.
        decay: ε of the running average; 0 keeps the present batch's blocks only.
    """

    kind: Kind = "exact"
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_decay(self.decay)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of each layer's block.

        Raises:
            ConfigError: one parameter's block alone would take more than 2 GiB; later, if all together do.
        """
        return _BlockEstimate(self, parameters)


class _BlockEstimate(WholeEstimate):
    def __init__(self, metric: Block, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        for name, p in self.parameters.items():
            require_room("block", p.numel() ** 2, p, f" for {name} alone")
        self._metric = metric
        self.kind = metric.kind
        self._moments: Moments | None = None
        self._weight = Weight()
        self._blocks: list[DenseOperator] = []

    def observe(self, observation: Observation) -> None:
        decay = self._metric.decay if observation.first else 1.0
        self._weight.add(observation.denominator(observation.first), decay)
        if self._moments is not None and decay != 1.0:
            self._moments.decay(decay)
        passes = observation.passes
        if self._moments is None:
            first = next(passes, None)
            if first is None:
                return
            self._moments, passes = self._begin(first.tape), _chained(first, passes)
        self._moments.add(passes, observation.numerator)
        self._blocks = []

    def _begin(self, tape: Tape) -> Moments:
        groups: dict[str, list[str]] = {}
        known: set[str] = set()
        for weight, block in tape.blocks.items():
            if all(name in self.parameters for name in block.names):
                groups[weight] = list(block.names)
                known.update(block.names)
        for name in self.parameters:
            if name not in known:
                groups.setdefault(f"{name.rpartition('.')[0]}.*", []).append(name)
        spaces = [self.space.restrict(names) for names in groups.values()]
        largest = max(spaces, key=lambda space: space.numel)
        total = sum(space.numel**2 for space in spaces)
        require_room("block", total, self._like(), f", most of it for {largest.label}")
        return Moments(spaces, self.parameters)

    def _like(self) -> Tensor:
        return next(iter(self.parameters.values()))

    def _matrices(self) -> list[DenseOperator]:
        if not self._blocks:
            if self._moments is None:
                raise StepError("no block was observed yet: run a forward pass and the loss before step()")
            self._blocks = [
                DenseOperator(space, self._moments.matrix(k).div_(self._weight.total))
                for k, space in enumerate(self._moments.groups)
            ]
        return self._blocks

    def operator(self) -> LinearOperator:
        blocks = self._matrices()
        return BlockDiagonal(self.space, blocks)

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        direction: dict[str, Tensor] = {}
        self.stages = {}
        for block in self._matrices():
            names = [name for name in block.space.names if name in gradient]
            if not names:
                continue
            moving = block.restrict(names)  # some of it may be frozen
            assert isinstance(moving, DenseOperator)
            direction |= dict(moving.solve({name: gradient[name] for name in names}, damping))
            _, stage = moving.cholesky(damping)
            if stage is not Stage.CHOLESKY:
                self.stages[block.space.label] = {"F": stage.value}
        return direction

    def state_dict(self) -> dict[str, Any]:
        moments = self._moments
        return {
            "groups": None if moments is None else [space.names for space in moments.groups],
            "moments": None if moments is None else moments.state_dict(),
            "weight": self._weight.total,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._moments, self._blocks = None, []
        self._weight = Weight(state["weight"])
        if state["groups"] is not None:
            self._moments = Moments(
                [self.space.restrict(names) for names in state["groups"]], self.parameters
            )
            self._moments.load_state_dict(state["moments"])


def _chained(first: SignalPass, rest: Iterator[SignalPass]) -> Iterator[SignalPass]:
    yield first
    yield from rest
