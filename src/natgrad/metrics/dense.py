"""The whole Fisher information matrix, for models that are small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import ConfigError, StepError
from natgrad.linalg import Stage, accumulate_gram
from natgrad.metrics.average import Weight
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, check_decay, check_kind
from natgrad.operators import Dense as DenseOperator
from natgrad.operators import LinearOperator
from natgrad.tape.passes import SignalPass, merged

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


class _DenseEstimate(Estimate):
    whole = True

    def __init__(self, metric: Dense, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        first = next(iter(self.parameters.values()))
        size = self.space.numel
        needed = size * size * first.element_size()
        if needed > LARGEST_BYTES:
            raise ConfigError(
                f'metric="dense" would need {needed / 2**30:.1f} GiB for {size:,} parameters; use metric="kfac"'
            )
        self._metric = metric
        self.kind = metric.kind
        self._total: Tensor | None = None
        self._weight = Weight()
        self._operator: DenseOperator | None = None
        self._restricted: DenseOperator | None = None

    def covers(self, name: str) -> bool:
        return name in self.parameters

    def due(self, step: int) -> bool:
        return True

    def observe(self, observation: Observation) -> None:
        decay = self._metric.decay if observation.first else 1.0
        self._weight.add(observation.denominator(observation.first), decay)
        if self._total is None:
            first = next(iter(self.parameters.values()))
            self._total = torch.zeros(
                self.space.numel, self.space.numel, dtype=first.dtype, device=first.device
            )
        for signal_pass in observation.passes:
            for rows in self._rows(signal_pass):
                accumulate_gram(self._total, rows, decay, observation.numerator)
                decay = 1.0  # further columns and chunks join what is there
        if decay != 1.0:  # every signal was zero, and so is this batch's F
            self._total.mul_(decay)
        self._operator = self._restricted = None

    def _rows(self, signal_pass: SignalPass) -> list[Float[Tensor, "batch P"]]:
        """Per-example scores in the order of flat vectors."""
        found: dict[str, Tensor] = {}
        for block, records in signal_pass.records(self.parameters).items():
            if not all(signal_pass.tape.covers(name) for name in block.names):
                continue
            inputs, signals = merged(records)
            if len(inputs) != signal_pass.examples:  # it acted on something that is not the batch
                continue
            scores = torch.einsum("nsgo,nsgi->ngoi", signals, inputs)
            if block.bias is None:
                found[block.weight] = scores.flatten(1)
            else:
                found[block.weight] = scores[..., :-1].flatten(1)
                found[block.bias] = scores[..., -1].flatten(1)
        missing = {name: p for name, p in self.parameters.items() if name not in found}
        if not missing:
            return [torch.cat([found[name] for name in self.space.names], dim=1)]
        rows = []
        for chunk, rest in signal_pass.scores(missing):
            parts = {name: score.flatten(1) for name, score in rest.items()}
            parts |= {name: score[chunk] for name, score in found.items()}
            rows.append(torch.cat([parts[name] for name in self.space.names], dim=1))
        return rows

    def operator(self) -> LinearOperator:
        if self._operator is None:
            if self._total is None:
                raise StepError(
                    "the Fisher matrix was not observed yet: run a forward pass and the loss before step()"
                )
            self._operator = DenseOperator(self.space, self._total / self._weight.total)
        return self._operator

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        self.operator()
        operator = self._on([name for name in self.space.names if name in gradient])
        solution = operator.solve({name: gradient[name] for name in operator.space.names}, damping)
        _, stage = operator.cholesky(damping)
        self.stages = {} if stage is Stage.CHOLESKY else {self.space.label: {"F": stage.value}}
        return dict(solution)

    def _on(self, names: list[str]) -> DenseOperator:
        """F̂ restricted to the parameters that move; kept until the next observation."""
        assert self._operator is not None
        if len(names) == len(self.space.names):
            return self._operator
        if self._restricted is None or self._restricted.space.names != tuple(names):
            index = torch.cat([torch.arange(self.space.numel)[self.space.slices[name]] for name in names])
            index = index.to(self._operator.device)
            matrix = self._operator.matrix[index[:, None], index]
            self._restricted = DenseOperator(self.space.restrict(names), matrix)
        return self._restricted

    def state_dict(self) -> dict[str, Any]:
        return {"total": self._total, "weight": self._weight.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._total = None if state["total"] is None else state["total"].clone()
        self._weight = Weight(state["weight"])
        self._operator = self._restricted = None
