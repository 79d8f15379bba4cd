"""The inverse of an operator, as an operator: in closed form where there is one, else its solutions as products."""

from __future__ import annotations

import dataclasses
from typing import final

import torch
from torch import Tensor

from natgrad.linalg.stochastic import Estimated
from natgrad.operators.algebra import Damped, damp
from natgrad.operators.base import LinearOperator
from natgrad.operators.blocks import BlockDiagonal
from natgrad.operators.checks import check_room, check_scalar, require_definite
from natgrad.operators.diagonal import Diagonal
from natgrad.operators.eigen import EigenKronecker
from natgrad.operators.hooks import Rows
from natgrad.operators.identity import ScaledIdentity
from natgrad.operators.kronecker import Kronecker
from natgrad.operators.lowrank import LowRank
from natgrad.operators.restricted import restrict
from natgrad.operators.wrapper import Wrapper


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Inverse(Wrapper):
    """B = (A + λI)⁻¹ by A's own answers: a product is a solution there, a solution a product.

    With more damping, (B + μI)⁻¹ = μ⁻¹ (A + λI)(A + (λ + μ⁻¹)I)⁻¹; so everything has a closed form that has one for A.
    The diagonal goes through the dense matrix.

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
        return self.operator._solve(rows, self.damping)

    def _solve(self, rows: Rows, damping: float) -> Rows:
        if damping == 0:
            return damp(self.operator, self.damping)._matmul(rows)
        inner = self.operator._solve(rows, self.damping + 1 / damping)
        product = damp(self.operator, self.damping)._matmul(inner)
        return {name: v / damping for name, v in product.items()}

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        return super()._pinv_solve(rows, rtol) if rtol else self._solve(rows, 0.0)

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        # (A + λI)^-½ = (A + λI)⁻¹ (A + λI)^½, and B + μI = μ (A + λI)⁻¹ (A + (λ + μ⁻¹)I); all of these commute.
        root = self.operator._solve(self.operator._sqrt_matmul(rows, self.damping), self.damping)
        if damping == 0:
            return root
        further = self.operator._sqrt_matmul(root, self.damping + 1 / damping)
        return {name: damping**0.5 * v for name, v in further.items()}

    def _dense(self) -> Tensor:
        check_room(self.space, self.dtype)
        identity = torch.eye(self.space.numel, dtype=self.dtype, device=self.device)
        dense = self.space.flatten_rows(self._matmul(self.space.unflatten_rows(identity)))
        return (dense + dense.mT) / 2

    def _diagonal(self) -> dict[str, Tensor]:
        return self.space.unflatten(self._dense().diagonal())

    def _logdet(self, damping: float) -> Tensor:
        own = self.operator._logdet(self.damping)
        if damping == 0:
            return -own
        scale = self.space.numel * torch.tensor(damping, dtype=self.dtype, device=self.device).log()
        return scale + self.operator._logdet(self.damping + 1 / damping) - own

    def _logdet_estimate(self, damping: float, probes: int, generator: torch.Generator | None) -> Estimated:
        own = self.operator._logdet_estimate(self.damping, probes, generator)
        if damping == 0:
            return Estimated(-own.value, own.standard_error)
        more = self.operator._logdet_estimate(self.damping + 1 / damping, probes, generator)
        scale = self.space.numel * torch.tensor(damping, dtype=self.dtype, device=self.device).log()
        error = torch.hypot(own.standard_error, more.standard_error)
        return Estimated(scale + more.value - own.value, error)

    def _eigenvalues(self, k: int) -> Tensor:
        values = self.operator._eigenvalues(self.space.numel) + self.damping
        least, largest, size = float(values.min()), float(values.max()), self.space.numel
        require_definite(least, largest, size, self.dtype, layer=self.space.label, factor="F")
        return values.reciprocal()

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        # Covariance A + λI; with damping (A + λI) times μ⁻¹ (A + (λ + μ⁻¹)I)⁻¹, from draws with the latter's.
        further = 1 / damping if damping else 0.0
        draws = (
            self.operator._sample(n, self.damping + further, generator)
            if damping
            else ScaledIdentity(self.space, dtype=self.dtype, device=self.device)._sample(n, 0.0, generator)
        )
        rows = self.operator._sqrt_matmul(draws, self.damping)
        return {name: further**0.5 * v for name, v in rows.items()} if damping else rows

    def _scaled(self, scale: float) -> LinearOperator:
        if scale == 0:
            return ScaledIdentity(self.space, 0.0, dtype=self.dtype, device=self.device)
        return Inverse(self.operator._scaled(1 / scale), self.damping / scale)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        return restrict(self, names)


def invert(operator: LinearOperator, damping: float) -> LinearOperator:
    """(A + λI)⁻¹ in the representation that suits it.

    Raises:
        NotPositiveDefiniteError: A is singular and λ is 0; for some representations only when it is asked something.
    """
    space = operator.space
    if isinstance(operator, Damped):
        return invert(operator.operator, operator.damping + damping)
    if isinstance(operator, Inverse) and damping == 0:
        return damp(operator.operator, operator.damping)
    if isinstance(operator, ScaledIdentity):
        scale = 1 / operator._definite(damping)
        return ScaledIdentity(space, scale, dtype=operator.dtype, device=operator.device)
    if isinstance(operator, Diagonal):
        values = operator._definite(damping)
        return Diagonal(space, {name: d.reciprocal() for name, d in values.items()})
    if isinstance(operator, Kronecker):
        return operator.inverse(damping)
    if isinstance(operator, EigenKronecker):
        return dataclasses.replace(operator, values=operator._definite(damping).reciprocal())
    if isinstance(operator, LowRank):
        operator._definite(damping)
        remainder = 1 / (operator.remainder + damping) if operator._others else 0.0
        return LowRank(space, operator.vectors, (operator.values + damping).reciprocal(), remainder)
    if isinstance(operator, BlockDiagonal):
        return BlockDiagonal(space, [invert(block, damping) for block in operator.blocks])
    return Inverse(operator, damping)
