"""Sums of operators: A + λI, and A + B, which keep a closed form where there is one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import torch
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.linalg.stochastic import Estimated
from natgrad.operators.base import LinearOperator
from natgrad.operators.blocks import BlockDiagonal
from natgrad.operators.checks import check_scalar
from natgrad.operators.dense import Dense
from natgrad.operators.diagonal import Diagonal
from natgrad.operators.hooks import Rows
from natgrad.operators.identity import ScaledIdentity
from natgrad.operators.matrixfree import MatrixFree
from natgrad.operators.rowoperator import RowOperator
from natgrad.operators.saving import describe_parts, rebuild_parts
from natgrad.operators.space import ParameterSpace
from natgrad.operators.wrapper import Wrapper


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Damped(Wrapper):
    """A + λI; every question is handed to A with more damping.

    Attributes:
        operator: A.
        damping: λ ≥ 0.

    Raises:
        ConfigError: λ is negative or not finite.
    """

    damping: float

    def __post_init__(self) -> None:
        check_scalar("damping", self.damping)
        object.__setattr__(self, "space", self.operator.space)

    def _matmul(self, rows: Rows) -> Rows:
        product = self.operator._matmul(rows)
        return {name: torch.add(product[name], v, alpha=self.damping) for name, v in rows.items()}

    def _solve(self, rows: Rows, damping: float) -> Rows:
        return self.operator._solve(rows, self.damping + damping)

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        if self.damping and rtol is None:
            return self.operator._solve(rows, self.damping)
        return super()._pinv_solve(rows, rtol) if self.damping else self.operator._pinv_solve(rows, rtol)

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self.operator._sqrt_matmul(rows, self.damping + damping)

    def _dense(self) -> Tensor:
        dense = self.operator._dense().clone()
        dense.diagonal().add_(self.damping)
        return dense

    def _diagonal(self) -> dict[str, Tensor]:
        return {name: d + self.damping for name, d in self.operator._diagonal().items()}

    def _logdet(self, damping: float) -> Tensor:
        return self.operator._logdet(self.damping + damping)

    def _eigenvalues(self, k: int) -> Tensor:
        return self.operator._eigenvalues(k) + self.damping

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        return self.operator._sample(n, self.damping + damping, generator)

    def _scaled(self, scale: float) -> LinearOperator:
        return Damped(self.operator._scaled(scale), scale * self.damping)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        return Damped(self.operator._restricted(names), self.damping)

    def _trace(self) -> Tensor:
        return self.operator._trace() + self.damping * self.space.numel

    def _trace_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        value, error = self.operator._trace_estimate(probes, generator)
        return Estimated(value + self.damping * self.space.numel, error)

    def _logdet_estimate(self, damping: float, probes: int, generator: torch.Generator | None) -> Estimated:
        return self.operator._logdet_estimate(self.damping + damping, probes, generator)

    def _diagonal_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        value, error = self.operator._diagonal_estimate(probes, generator)
        return Estimated(value + self.damping, error)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearOperator):
    """A + B with no closed form: products go to both, all else through the dense matrix, which is built once.

    Attributes:
        left: A.
        right: B.
    """

    left: LinearOperator
    right: LinearOperator

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", self.left.space)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """The device of both."""
        return self.left.device

    @functools.cached_property
    def _whole(self) -> Dense:
        return Dense(self.space, self.left._dense() + self.right._dense())

    def _matmul(self, rows: Rows) -> Rows:
        left, right = self.left._matmul(rows), self.right._matmul(rows)
        return {name: left[name] + right[name] for name in rows}

    def _solve(self, rows: Rows, damping: float) -> Rows:
        return self._whole._solve(rows, damping)

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        return self._whole._pinv_solve(rows, rtol)

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._whole._sqrt_matmul(rows, damping)

    def _dense(self) -> Tensor:
        return self._whole.matrix

    def _diagonal(self) -> dict[str, Tensor]:
        left, right = self.left._diagonal(), self.right._diagonal()
        return {name: left[name] + right[name] for name in self.space.names}

    def _logdet(self, damping: float) -> Tensor:
        return self._whole._logdet(damping)

    def _eigenvalues(self, k: int) -> Tensor:
        return self._whole._eigenvalues(k)

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        return self._whole._sample(n, damping, generator)

    def _scaled(self, scale: float) -> LinearOperator:
        return Sum(self.left._scaled(scale), self.right._scaled(scale))

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        return add(self.left._restricted(names), self.right._restricted(names))

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Sum(self.left._to(dtype, device), self.right._to(dtype, device))

    def _trace(self) -> Tensor:
        return self.left._trace() + self.right._trace()

    def _trace_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        return _plus(
            self.left._trace_estimate(probes, generator), self.right._trace_estimate(probes, generator)
        )

    def _diagonal_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        return _plus(
            self.left._diagonal_estimate(probes, generator), self.right._diagonal_estimate(probes, generator)
        )

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, parts = describe_parts([self.left, self.right])
        return tensors, {"parts": parts}

    @classmethod
    def _from_state(cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Sum:
        return cls(*rebuild_parts(tensors, meta["parts"]))


def _plus(left: Estimated, right: Estimated) -> Estimated:
    """The sum of two independent estimates."""
    return Estimated(left.value + right.value, torch.hypot(left.standard_error, right.standard_error))


def damp(operator: LinearOperator, damping: float) -> LinearOperator:
    """A + λI; A itself if λ is 0.

    Raises:
        ConfigError: λ is negative or not finite.
    """
    check_scalar("damping", damping)
    if damping == 0:
        return operator
    if isinstance(operator, Damped):
        return Damped(operator.operator, operator.damping + damping)
    return Damped(operator, float(damping))


def add(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """A + B: in closed form with a multiple of the identity, and for two operators of one structure.

    Raises:
        ConfigError: they act on different spaces, or in different dtypes or on different devices.
    """
    if left.space != right.space:
        raise ConfigError(
            f"the operators act on different parameter spaces: {left.space.label} ({left.space.numel} coordinates) "
            f"and {right.space.label} ({right.space.numel}), or list their parameters in different orders"
        )
    if (left.dtype, left.device) != (right.dtype, right.device):
        raise ConfigError(
            f"the operators are {left.dtype} on {left.device} and {right.dtype} on {right.device}; convert one"
        )
    for one, other in ((left, right), (right, left)):
        if isinstance(other, ScaledIdentity):
            if isinstance(one, ScaledIdentity):
                return ScaledIdentity(one.space, one.scale + other.scale, dtype=one.dtype, device=one.device)
            return damp(one, other.scale)
        if isinstance(other, Damped):
            return damp(add(one, other.operator), other.damping)
    if isinstance(left, Diagonal) and isinstance(right, Diagonal):
        values = {name: left.values[name] + right.values[name] for name in left.space.names}
        return Diagonal(left.space, values)
    if isinstance(left, Dense) and isinstance(right, Dense):
        return Dense(left.space, left.matrix + right.matrix)
    if isinstance(left, RowOperator) and type(left) is type(right):
        return dataclasses.replace(left, rows=left.rows + right.rows)
    if isinstance(left, MatrixFree) and isinstance(right, MatrixFree):
        return left.joined(right)
    if isinstance(left, BlockDiagonal) and isinstance(right, BlockDiagonal):
        matching = {block.space.entries: block for block in right.blocks}
        if all(block.space.entries in matching for block in left.blocks):
            blocks = [add(block, matching[block.space.entries]) for block in left.blocks]
            return BlockDiagonal(left.space, blocks)
    return Sum(left, right)
