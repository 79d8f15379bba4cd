"""The whole Fisher information matrix, for models that are small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from natgrad.errors import ConfigError, StepError
from natgrad.linalg import Stage
from natgrad.metrics.average import Weight
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, WholeEstimate, check_decay, check_kind
from natgrad.metrics.moments import Moments
from natgrad.operators import Dense as DenseOperator
from natgrad.operators import LinearOperator

LARGEST_BYTES = 2**31


@dataclass(frozen=True)
class Dense(Metric):
    """F [P, P] of every trainable parameter, coupled across layers.

    Parameters that no rule of the tape covers join through their per-example gradients, so nothing is left out.

    Attributes:
        kind: "exact" sums over all output columns; "mc" and "empirical" take one signal for each example.
        decay: ε of the running average; 0 keeps the present batch's matrix only.
    """

    kind: Kind = "exact"
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_decay(self.decay)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the whole matrix.

        Raises:
            ConfigError: the matrix would take more than 2 GiB.
        """
        return _DenseEstimate(self, parameters)


class _DenseEstimate(WholeEstimate):
    def __init__(self, metric: Dense, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        first = next(iter(self.parameters.values()))
        size = self.space.numel
        require_room("dense", size * size, first, f" for {size:,} parameters")
        self._metric = metric
        self.kind = metric.kind
        self._moments = Moments([self.space], self.parameters)
        self._weight = Weight()
        self._operator: DenseOperator | None = None
        self._restricted: DenseOperator | None = None

    def observe(self, observation: Observation) -> None:
        decay = self._metric.decay if observation.first else 1.0
        self._weight.add(observation.denominator(observation.first), decay)
        if decay != 1.0:
            self._moments.decay(decay)
        self._moments.add(observation.passes, observation.numerator)
        self._operator = self._restricted = None

    def operator(self) -> LinearOperator:
        if self._operator is None:
            if not self._weight.total:
                raise StepError(
                    "the Fisher matrix was not observed yet: run a forward pass and the loss before step()"
                )
            matrix = self._moments.matrix(0).div_(self._weight.total)
            self._operator = DenseOperator(self.space, matrix)
        return self._operator

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        operator = self._on(tuple(name for name in self.space.names if name in gradient))
        solution = operator.solve({name: gradient[name] for name in operator.space.names}, damping)
        _, stage = operator.cholesky(damping)
        self.stages = {} if stage is Stage.CHOLESKY else {self.space.label: {"F": stage.value}}
        return dict(solution)

    def _on(self, names: tuple[str, ...]) -> DenseOperator:
        """F̂ restricted to the parameters that move; kept until the next observation."""
        if self._restricted is None or self._restricted.space.names != names:
            restricted = self.operator().restrict(names)
            assert isinstance(restricted, DenseOperator)
            self._restricted = restricted
        return self._restricted

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments.state_dict(), "weight": self._weight.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._moments.load_state_dict(state["moments"])
        self._weight = Weight(state["weight"])
        self._operator = self._restricted = None


def require_room(metric: str, entries: int, like: Tensor, largest: str = "") -> None:
    """Sees that a matrix, or several, would fit.

    Args:
        metric: its name, for the error.
        entries: how many numbers there would be.
        like: a tensor of their dtype.
        largest: what takes most of it, for the error.

    Raises:
        ConfigError: it would not; says how many bytes it takes, and what to use instead.
    """
    needed = entries * like.element_size()
    if needed > LARGEST_BYTES:
        raise ConfigError(
            f'metric="{metric}" would need {needed / 2**30:.1f} GiB ({needed:,} bytes){largest}, and '
            f'{LARGEST_BYTES / 2**30:.0f} GiB is its limit; use metric="kfac" or "ekfac", or "matrixfree" for exact '
            "products"
        )
