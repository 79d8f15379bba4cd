"""K-FAC: each layer's Fisher block as the Kronecker product of two small factors.

Martens & Grosse 2015 (arXiv 1503.05671), §3–4; convolutions as in Grosse & Martens 2016 (arXiv 1602.01407), which is
the "expand" form of Eschenhagen et al. 2023 (arXiv 2311.00636) for any map whose weight is shared over positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, StepError
from natgrad.linalg import Stage, accumulate_gram
from natgrad.metrics.average import Weight, decay_since
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, check_decay, check_kind
from natgrad.metrics.refresh import Refresh
from natgrad.operators import BlockDiagonal, FactoredInverse, Kronecker, LinearOperator, ParameterSpace
from natgrad.tape.passes import merged
from natgrad.tape.records import Block, LayerRecord


@dataclass(frozen=True)
class KFAC(Metric):
    """F ≈ blockdiag(A ⊗ G): second moments of each layer's inputs, and of the signals sent back to its outputs.

    Attributes:
        kind: the signals behind G: sampled from the model ("mc"), every output column ("exact"), real gradients
            ("empirical"), or random signs times a root of the outputs' Fisher information ("rademacher").
        decay: ε of the running averages (Martens & Grosse 2015, §5).
        factors: observe the factors every so many steps; adapted to how fast they move if None.
        inverses: invert them every so many steps; adapted likewise if None.
        examples: at most so many examples of a batch enter the factors, evenly spaced; None for all. Their average
            over steps is fed often enough, and the products behind them are most of an observation's cost.
    """

    kind: Kind = "mc"
    decay: float = 0.95
    factors: int | None = None
    inverses: int | None = None
    examples: int | None = 512

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_decay(self.decay)
        Refresh(self.factors)
        Refresh(self.inverses)
        if self.examples is not None and self.examples < 1:
            raise ConfigError(f"examples={self.examples} must be at least 1, or None for all")

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the factors for the linear maps and convolutions among the parameters."""
        return _KFACEstimate(self, parameters)


class _Factors:
    """The running sums behind one block's factors: A = ΣÃ ãᵀ / Σ1 and G = ΣΣ g gᵀ / Σ1."""

    def __init__(self, block: Block, space: ParameterSpace, like: Tensor) -> None:
        self.block, self.space = block, space
        groups = (block.groups,) if block.groups > 1 else ()
        self.A = like.new_zeros(*groups, block.columns, block.columns)
        self.G = like.new_zeros(*groups, block.outputs, block.outputs)
        self.A_weight, self.G_weight = Weight(), Weight()
        self.step: int | None = None  # when it was last observed
        self.inverse: FactoredInverse | None = None

    def add_inputs(self, records: list[LayerRecord], decay: float) -> None:
        record = records[0]
        if len(records) == 1 and self.block.groups == 1:
            x = record.inputs.flatten(0, 1)
            size = x.shape[1]
            accumulate_gram(self.A[:size, :size], x, decay, 1.0)
            if self.block.bias is not None:  # the homogeneous coordinate, without a copy of the inputs
                edge = self.A[:size, size]
                edge.mul_(decay).add_(x.sum(0), alpha=float(record.has_bias))
                self.A[size, :size] = edge
                self.A[size, size] = decay * self.A[size, size] + len(x) * float(record.has_bias)
            self.A_weight.add(len(x), decay)
            return
        rows = _by_group(merged(records)[0])
        accumulate_gram(self.A, rows, decay, 1.0)
        self.A_weight.add(rows.shape[-2], decay)

    def add_signals(self, records: list[LayerRecord], decay: float, numerator: float) -> None:
        accumulate_gram(self.G, _by_group(merged_signals(records)), decay, numerator)

    def averages(self) -> tuple[Tensor, Tensor]:
        return self.A / self.A_weight.total, self.G / self.G_weight.total


class _KFACEstimate(Estimate):
    def __init__(self, metric: KFAC, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._metric = metric
        self.kind = metric.kind
        self._blocks: dict[str, _Factors] = {}
        self._observing = Refresh(metric.factors)
        self._inverting = Refresh(metric.inverses, longest=10)
        self._root_damping: float | None = None

    def covers(self, name: str) -> bool:
        return any(name in factors.block.names for factors in self._blocks.values())

    def due(self, step: int) -> bool:
        return self._observing.due(step)

    def observe(self, observation: Observation) -> None:
        seen: set[str] = set()
        most = self._metric.examples
        stride = 1 if most is None else -(-observation.examples // most)
        share = -(-observation.examples // stride) / observation.examples
        for signal_pass in observation.passes:
            for block, found in signal_pass.records(self.parameters).items():
                records = [record.thinned(stride) for record in found]
                factors = self._factors(block)
                first_column = block.weight not in seen
                if first_column:  # the inputs are the same in every pass of one batch
                    seen.add(block.weight)
                    first = observation.first or factors.step != observation.step
                    decay = decay_since(self._metric.decay, factors.step, observation.step)
                    factors.step = observation.step
                    factors.add_inputs(records, decay)
                    factors.G_weight.add(observation.denominator(first), decay)
                factors.add_signals(records, decay if first_column else 1.0, observation.numerator / share)
        self._observing.took(observation.step)
        self._observing.observed(self._sums())

    def _sums(self) -> dict[str, Tensor]:
        return {f"{w}.{side}": getattr(f, side) for w, f in self._blocks.items() for side in "AG"}

    def _factors(self, block: Block) -> _Factors:
        if block.weight not in self._blocks:
            space = self.space.restrict(block.names)
            self._blocks[block.weight] = _Factors(block, space, self.parameters[block.weight])
        return self._blocks[block.weight]

    def operator(self) -> LinearOperator:
        if not self._blocks:
            raise StepError("no factor was observed yet: run a forward pass and the loss before step()")
        blocks = [Kronecker(factors.space, *factors.averages()) for factors in self._blocks.values()]
        return BlockDiagonal(self.space.restrict(n for b in blocks for n in b.space.names), blocks)

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        if not self._blocks:
            raise StepError("no factor was observed yet: run a forward pass and the loss before step()")
        if self._inverting.due(step):
            self._invert(damping, step)
        direction: dict[str, Tensor] = {}
        for factors in self._blocks.values():
            if factors.inverse is None:
                factors.inverse = FactoredInverse(factors.space, *factors.averages(), damping)
            names = factors.block.names
            if any(name in gradient for name in names):  # a bias may be frozen, or its weight
                zeros = {n: torch.zeros_like(self.parameters[n]) for n in names if n not in gradient}
                given = {n: zeros[n] if n in zeros else gradient[n] for n in names}
                direction |= factors.inverse.solve(given)
        return direction

    def _invert(self, damping: float, step: int) -> None:
        self.stages = {}
        for weight, factors in self._blocks.items():
            A, G = factors.averages()
            if factors.inverse is None:
                factors.inverse = FactoredInverse(factors.space, A, G, damping)
            else:
                factors.inverse.refresh(A, G, damping)
            stages = {side: s.value for side, s in factors.inverse.stages.items() if s is not Stage.CHOLESKY}
            if stages:
                self.stages[weight] = stages
        self._inverting.took(step)
        old, self._root_damping = self._root_damping, math.sqrt(damping)
        moved = abs(self._root_damping / old - 1.0) if old else 0.0
        self._inverting.observed(self._sums(), moved / 4)

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": {
                weight: {
                    "block": vars(f.block).copy(),
                    "A": f.A,
                    "G": f.G,
                    "weights": (f.A_weight.total, f.G_weight.total),
                    "step": f.step,
                    "inverse": None if f.inverse is None else (f.inverse.A_inverse, f.inverse.G_inverse),
                }
                for weight, f in self._blocks.items()
            },
            "observing": self._observing.state_dict(),
            "inverting": self._inverting.state_dict(),
            "root_damping": self._root_damping,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks = {}
        for saved in state["blocks"].values():
            factors = self._factors(Block(**saved["block"]))
            factors.A.copy_(saved["A"])
            factors.G.copy_(saved["G"])
            factors.A_weight, factors.G_weight = map(Weight, saved["weights"])
            factors.step = saved["step"]
            if saved["inverse"] is not None:
                identity_A, identity_G = (
                    torch.eye(t.shape[-1], dtype=t.dtype, device=t.device).expand_as(t)
                    for t in saved["inverse"]
                )
                factors.inverse = FactoredInverse(factors.space, identity_A, identity_G, 0.0)
                factors.inverse.A_inverse.copy_(saved["inverse"][0])
                factors.inverse.G_inverse.copy_(saved["inverse"][1])
        self._observing.load_state_dict(state["observing"])
        self._inverting.load_state_dict(state["inverting"])
        self._root_damping = state["root_damping"]


def merged_signals(records: list[LayerRecord]) -> Tensor:
    """Signals of one block, its several uses side by side as positions: [batch, shared, groups, outputs]."""
    if len(records) == 1:
        return records[0].grouped_signals()
    return torch.cat([record.grouped_signals() for record in records], dim=1)


def _by_group(rows: Tensor) -> Tensor:
    """[batch, shared, groups, f] → [batch · shared, f], or [groups, batch · shared, f] where there are several."""
    batch, shared, groups, size = rows.shape
    if groups == 1:
        return rows.reshape(batch * shared, size)
    return rows.permute(2, 0, 1, 3).reshape(groups, batch * shared, size)
