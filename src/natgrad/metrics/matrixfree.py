"""The exact Fisher information as products alone, solved by conjugate gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError
from natgrad.linalg.iterate import Convergence, conjugate_gradients
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, WholeEstimate, check_kind
from natgrad.metrics.kept import KeptRows, check_memory
from natgrad.metrics.kfac import KFAC
from natgrad.operators import BlockDiagonal, LinearOperator, ScaledIdentity
from natgrad.operators import MatrixFree as MatrixFreeOperator


@dataclass(frozen=True)
class MatrixFree(Metric):
    """F of the present batch by its products: two matrix products a layer, whatever the number of outputs.

    Rows of different steps don't join, so there is no average over steps. Solutions in the optimiser begin at the last
    one, and end when they make no more progress (Martens 2010, "Deep learning via Hessian-free optimization", §4.4).

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
        memory: how many bytes the rows of F may take; `natgrad.fisher` runs the model again for the batches beyond,
            in each product.
        preconditioner: "kfac" to iterate with K-FAC's solution of the same batch as a guide; None for none.
        progress: the optimiser's solutions end where an iteration gains less than this share of all that was gained;
            0 goes on to the precision of the dtype.
        limit: the most iterations.
    """

    kind: Kind = "exact"
    memory: float = 2.0**30
    preconditioner: str | None = None
    progress: float = 5e-4
    limit: int = 1000

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_memory(self.memory)
        if self.preconditioner not in (None, "kfac"):
            raise ConfigError(f'preconditioner={self.preconditioner!r} must be "kfac" or None')
        if not 0 <= self.progress < 1 or self.limit < 1:
            raise ConfigError(
                f"progress={self.progress} must lie in [0, 1), and limit={self.limit} be positive"
            )

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate of the whole matrix."""
        return _MatrixFreeEstimate(self, parameters)


class _MatrixFreeEstimate(WholeEstimate):
    """Attributes: convergence, how the last solution went."""

    replays = True

    def __init__(self, metric: MatrixFree, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._metric, self.kind = metric, metric.kind
        self._kept = KeptRows(parameters, metric.memory)
        self._near: Estimate | None = None
        self._operator: MatrixFreeOperator | None = None
        self._last: dict[str, Tensor] = {}
        self.convergence: Convergence | None = None

    def observe(self, observation: Observation) -> None:
        self._operator = None
        if self._metric.preconditioner is not None:
            passes = list(observation.passes)
            if observation.first or self._near is None:
                # Of this step alone, as the rows are.
                self._near = KFAC(kind=self._metric.kind, decay=0.0, examples=None).start(self.parameters)
            self._near.observe(replace(observation, passes=iter(passes)))
            observation = replace(observation, passes=iter(passes))
        self._kept.add(observation)

    def operator(self) -> LinearOperator:
        return self._matrix_free()

    def _matrix_free(self) -> MatrixFreeOperator:
        if self._operator is None:
            first = next(iter(self.parameters.values()))
            rows, product = self._kept.factored(), self._kept.product()
            self._operator = MatrixFreeOperator(
                self.space,
                product,
                rows,
                dtype=first.dtype,
                device=first.device,
                preconditioner=self._guide(),
                limit=self._metric.limit,
            )
        return self._operator

    def _guide(self) -> LinearOperator | None:
        """K-FAC where it covers, and the mean of its diagonal for the other parameters."""
        if self._near is None or not any(map(self._near.covers, self.space.names)):
            return None
        near = self._near.operator()
        others = [name for name in self.space.names if name not in near.space.shapes]
        if not others:
            return BlockDiagonal(self.space, _blocks(near))
        space, first = self.space.restrict(others), self.parameters[others[0]]
        mean = float(near.trace()) / near.space.numel
        rest = ScaledIdentity(space, mean, dtype=first.dtype, device=first.device)
        return BlockDiagonal(self.space, [*_blocks(near), rest])

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        names = tuple(name for name in self.space.names if name in gradient)
        operator = self._matrix_free().restrict(names)
        assert isinstance(operator, MatrixFreeOperator)
        space = operator.space
        start = torch.stack([space.flatten(self._start(gradient, names))])
        solution, self.convergence = conjugate_gradients(
            operator._damped(damping),
            space.flatten({name: gradient[name] for name in names})[None],
            tolerance=operator._tolerance,
            progress=self._metric.progress,
            precondition=operator._precondition(damping),
            start=start,
            limit=self._metric.limit,
        )
        self._last = {name: v.clone() for name, v in space.unflatten(solution[0]).items()}
        return dict(self._last)

    def _start(self, gradient: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
        return {
            name: self._last[name] if name in self._last else torch.zeros_like(gradient[name])
            for name in names
        }

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = {name: v.clone() for name, v in state["last"].items()}
        self._kept, self._near, self._operator = KeptRows(self.parameters, self._metric.memory), None, None


def _blocks(operator: LinearOperator) -> list[LinearOperator]:
    return list(operator.blocks) if isinstance(operator, BlockDiagonal) else [operator]
