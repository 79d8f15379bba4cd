"""The multiple of the identity: plain gradient descent's metric, and a Gaussian prior's precision."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import check_room, check_scalar, require_definite, standard_normal
from natgrad.operators.hooks import Rows
from natgrad.operators.space import ParameterSpace


@final
class ScaledIdentity(LinearOperator):
    """c·I.

    Attributes:
        space: the parameter space.
        scale: c ≥ 0.
    """

    def __init__(
        self,
        space: ParameterSpace,
        scale: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Takes the scale, and the dtype (torch's default if not given) and device of the vectors.

        Raises:
            ConfigError: c is negative or not finite.
        """
        check_scalar("scale", scale)
        self.space, self.scale = space, float(scale)
        self._dtype, self._device = dtype or torch.get_default_dtype(), torch.device(device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors that it takes."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors that it takes."""
        return self._device

    def _definite(self, damping: float) -> float:
        if damping == 0:
            require_definite(self.scale, self.scale, 0, self.dtype, layer=self.space.label, factor="c·I")
        return self.scale + damping

    def _matmul(self, rows: Rows) -> Rows:
        return {name: self.scale * v for name, v in rows.items()}

    def _solve(self, rows: Rows, damping: float) -> Rows:
        total = self._definite(damping)
        return {name: b / total for name, b in rows.items()}

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        factor = 1 / self.scale if self.scale > (rtol or 0) * self.scale else 0.0
        return {name: factor * b for name, b in rows.items()}

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        root = math.sqrt(self.scale + damping)
        return {name: root * v for name, v in rows.items()}

    def _full(self, *shape: int) -> Tensor:
        return torch.full(shape, self.scale, dtype=self.dtype, device=self.device)

    def _dense(self) -> Tensor:
        check_room(self.space, self.dtype)
        return torch.diag(self._full(self.space.numel))

    def _diagonal(self) -> dict[str, Tensor]:
        return {name: self._full(*shape) for name, shape in self.space.entries}

    def _logdet(self, damping: float) -> Tensor:
        total = self.space.numel * math.log(self._definite(damping))
        return torch.tensor(total, dtype=self.dtype, device=self.device)

    def _eigenvalues(self, k: int) -> Tensor:
        return self._full(k)

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        deviation = self._definite(damping) ** -0.5
        return {
            name: deviation * standard_normal(n, shape, self.dtype, self.device, generator)
            for name, shape in self.space.entries
        }

    def _scaled(self, scale: float) -> LinearOperator:
        return ScaledIdentity(self.space, scale * self.scale, dtype=self.dtype, device=self.device)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        return ScaledIdentity(self.space.restrict(names), self.scale, dtype=self.dtype, device=self.device)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return ScaledIdentity(self.space, self.scale, dtype=dtype, device=device)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"scale": self.scale, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> ScaledIdentity:
        return cls(space, meta["scale"], dtype=getattr(torch, meta["dtype"]))
