"""The diagonal operator: one number a parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import check_room, pseudo_inverse, require_definite, standard_normal
from natgrad.operators.hooks import Rows
from natgrad.operators.space import ParameterSpace


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagonal(LinearOperator):
    """diag(d).

    Attributes:
        space: the parameter space.
        values: d ≥ 0, each parameter's part in its shape; a flat [P] is `space.unflatten(d)`. The sign is not checked,
            as that would cost a pass over all parameters whenever a metric hands out its operator.

    Raises:
        VectorError: d does not lie in the space.
    """

    space: ParameterSpace
    values: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.space.check(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of d."""
        return self.values[self.space.names[0]].dtype

    @property
    def device(self) -> torch.device:
        """The device of d."""
        return self.values[self.space.names[0]].device

    def _definite(self, damping: float) -> dict[str, Tensor]:
        if damping == 0:
            # Each coordinate is solved for by itself, so nothing but zero is singular.
            least = min((float(d.min()) for d in self.values.values() if d.numel()), default=1.0)
            require_definite(least, 0.0, 0, self.dtype, layer=self.space.label, factor="diag(d)")
        return {name: self.values[name] + damping for name in self.space.names}

    def _matmul(self, rows: Rows) -> Rows:
        return {name: self.values[name] * v for name, v in rows.items()}

    def _solve(self, rows: Rows, damping: float) -> Rows:
        total = self._definite(damping)
        return {name: b / total[name] for name, b in rows.items()}

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        inverse = self.space.unflatten(pseudo_inverse(self._flat(), rtol or 0.0, 0))
        return {name: b * inverse[name] for name, b in rows.items()}

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return {name: (self.values[name] + damping).sqrt() * v for name, v in rows.items()}

    def _flat(self) -> Tensor:
        return torch.cat([self.values[name].reshape(-1) for name in self.space.names])

    def _dense(self) -> Tensor:
        check_room(self.space, self.dtype)
        return torch.diag(self._flat())

    def _diagonal(self) -> dict[str, Tensor]:
        return {name: self.values[name] for name in self.space.names}

    def _logdet(self, damping: float) -> Tensor:
        return torch.stack([d.log().sum() for d in self._definite(damping).values()]).sum()

    def _eigenvalues(self, k: int) -> Tensor:
        return self._flat()

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        return {
            name: standard_normal(n, tuple(d.shape), self.dtype, self.device, generator) * d.rsqrt()
            for name, d in self._definite(damping).items()
        }

    def _scaled(self, scale: float) -> LinearOperator:
        return Diagonal(self.space, {name: scale * d for name, d in self._diagonal().items()})

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        return Diagonal(self.space.restrict(names), {name: self.values[name] for name in names})

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Diagonal(self.space, {name: d.to(device, dtype) for name, d in self._diagonal().items()})

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._diagonal(), {}

    @classmethod
    def _from_state(cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Diagonal:
        return cls(space, tensors)
