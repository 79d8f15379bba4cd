"""The largest eigenvalues of the exact Fisher information, and a multiple of the identity for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError
from natgrad.linalg.lanczos import Eigenpairs, largest_eigenpairs, norm_bound
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, WholeEstimate, check_kind
from natgrad.metrics.kept import KeptRows, check_memory
from natgrad.operators import LinearOperator, MatrixFree
from natgrad.operators import LowRank as LowRankOperator


@dataclass(frozen=True)
class LowRank(Metric):
    """F ≈ U diag(s) Uᵀ + σ(I − UUᵀ): the top eigenpairs by block Lanczos, and σ so that the trace is F's.

    It is an approximation of the present batch's F: rows of different steps don't join, so there is no average over
    steps. Its operator's `error` bounds ‖F − F̂‖₂, with a probability of 0.999.

    Attributes:
        rank: how many eigenpairs.
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
        memory: how many bytes the rows of F may take; `natgrad.fisher` runs the model again for the batches beyond.
        seed: of the random start.
    """

    rank: int = 32
    kind: Kind = "exact"
    memory: float = 2.0**30
    seed: int = 0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")
        check_memory(self.memory)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the whole matrix."""
        return _LowRankEstimate(self, parameters)


class _LowRankEstimate(WholeEstimate):
    replays = True

    def __init__(self, metric: LowRank, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._metric, self.kind = metric, metric.kind
        self._kept = KeptRows(parameters, metric.memory)
        self._operator: LowRankOperator | None = None

    def observe(self, observation: Observation) -> None:
        self._operator = None
        self._kept.add(observation)

    def operator(self) -> LinearOperator:
        if self._operator is None:
            first = next(iter(self.parameters.values()))
            exact = MatrixFree(
                self.space,
                self._kept.product(),
                self._kept.factored(),
                dtype=first.dtype,
                device=first.device,
            )
            self._operator = low_rank(exact, self._metric.rank, self._metric.seed)
        return self._operator

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        names = [name for name in self.space.names if name in gradient]
        return dict(self.operator().restrict(names).solve({n: gradient[n] for n in names}, damping))

    def state_dict(self) -> dict[str, Any]:
        return {}  # each step begins anew

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept, self._operator = KeptRows(self.parameters, self._metric.memory), None


@torch.no_grad()
def low_rank(operator: LinearOperator, rank: int, seed: int = 0) -> LowRankOperator:
    """The best approximation of an operator by so many eigenpairs and a multiple of the identity.

    Args:
        operator: F; only its products and its trace are asked for.
        rank: how many eigenpairs; all if there are fewer.
        seed: of the random start.
    """
    space, size = operator.space, operator.space.numel
    generator = torch.Generator(device=operator.device).manual_seed(seed)

    def product(v: Tensor) -> Tensor:
        return space.flatten_rows(operator._matmul(space.unflatten_rows(v)))

    dtype, device = operator.dtype, operator.device
    pairs = largest_eigenpairs(
        product, size, min(rank, size), dtype=dtype, device=device, generator=generator
    )
    values = pairs.values.clamp_min(0)
    left, others = float(operator.trace() - values.sum()), size - len(values)
    sigma = max(left, 0.0) / others if others else 0.0
    error = float(pairs.residuals.norm())  # off the diagonal, in the basis of U and the rest
    if others:
        deflated = norm_bound(
            _deflated(product, pairs), size, dtype=dtype, device=device, generator=generator
        )
        error += max(sigma, min(deflated, max(left, 0.0)) - sigma)
    return LowRankOperator(space, pairs.vectors.contiguous(), values, sigma, error)


def _deflated(product: Callable[[Tensor], Tensor], pairs: Eigenpairs) -> Callable[[Tensor], Tensor]:
    """The product with (I − UUᵀ) F (I − UUᵀ)."""

    def without(v: Tensor) -> Tensor:
        return v - (v @ pairs.vectors.mT) @ pairs.vectors

    return lambda v: without(product(without(v)))
