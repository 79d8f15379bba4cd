"""The exact operator whose square root is there: F = JᵀJ through the singular values of J itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, NonFiniteError
from natgrad.operators.base import LinearOperator
from natgrad.operators.hooks import Rows
from natgrad.operators.lowrank import LowRank
from natgrad.operators.rowoperator import RowOperator

# J of more bytes than this is not formed.
LARGEST_BYTES = 2**31


class SingularValues(NamedTuple):
    """J = U diag(S) Vᵀ, S in descending order, with U = Q W and Q as the reflections of a QR factorisation.

    Reflections are applied to a vector in a tenth of the time that it takes to write Q out.
    """

    reflections: tuple[Float[Tensor, "M k"], Float[Tensor, "k"]] | None
    inner: Float[Tensor, "k k"]
    values: Float[Tensor, "k"]
    right: Float[Tensor, "k P"]

    def coordinates(self, targets: Float[Tensor, "K M"]) -> Float[Tensor, "K k"]:
        """Uᵀ r for K vectors."""
        if self.reflections is not None:
            columns = targets.mT.contiguous()
            targets = torch.ormqr(*self.reflections, columns, transpose=True)[: len(self.inner)].mT
        return targets @ self.inner


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rectangular(RowOperator):
    """JᵀJ with J [M, P] formed, for the last digits of a least-squares problem.

    The condition number of JᵀJ, and of JJᵀ, is the square of J's. Whatever is solved through either loses twice the
    digits: singular values below √ε S₁, 1e-8 of the largest one in float64, are rounding there, and here those below ε.

    Raises:
        ConfigError: J would take more than 2 GiB, when it is needed.
    """

    @functools.cached_property
    def jacobian(self) -> Float[Tensor, "M P"]:
        """J."""
        needed = len(self.rows) * self.space.numel * self.rows.itemsize
        if needed > LARGEST_BYTES:
            raise ConfigError(
                f"J [{len(self.rows):,}, {self.space.numel:,}] would take {needed / 2**30:.1f} GiB ({needed:,} bytes); "
                "use metric='gram', which does not form it, or 'matrixfree'"
            )
        return self.rows.dense()

    @functools.cached_property
    def singular(self) -> SingularValues:
        """The singular value decomposition of J, of its triangular factor where it is long or wide.

        Raises:
            NonFiniteError: J has an entry that is not finite.
        """
        J = self.jacobian
        if not bool(torch.isfinite(J.sum())):
            raise NonFiniteError(f"the Jacobian of {self.space.label} has an entry that is not finite")
        if J.shape[0] < J.shape[1]:
            q, r = torch.linalg.qr(J.mT)
            left, values, right = torch.linalg.svd(r.mT, full_matrices=False)
            return SingularValues(None, left, values, right @ q.mT)
        packed, tau = torch.geqrf(J)
        left, values, right = torch.linalg.svd(packed[: J.shape[1]].triu())
        return SingularValues((packed, tau), left, values, right)

    @functools.cached_property
    def _spectrum(self) -> LowRank:
        return LowRank(self.space, self.singular.right, self.singular.values.square())

    @property
    def condition(self) -> float:
        """The largest singular value of J over the least; its square is the condition number of F."""
        values = self.singular.values
        return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")

    def effective_rank(self, damping: float) -> int:
        """How many singular values are above √λ, and above rounding."""
        values = self.singular.values
        least = max(damping**0.5, len(values) * torch.finfo(values.dtype).eps * float(values[0]))
        return int((values > least).sum())

    def _dual_solve(self, targets: Tensor, damping: float, order: float) -> Rows:
        values = self.singular.values
        weights = values * self._filter(values.square(), damping, order)
        return self.space.unflatten_rows((self.singular.coordinates(targets) * weights) @ self.singular.right)

    def _solve(self, rows: Rows, damping: float) -> Rows:
        return self._spectrum._solve(rows, damping)

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        return self._spectrum._pinv_solve(rows, rtol)

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._spectrum._sqrt_matmul(rows, damping)

    def _dense(self) -> Tensor:
        return self.jacobian.mT @ self.jacobian

    def _logdet(self, damping: float) -> Tensor:
        return self._spectrum._logdet(damping)

    def _eigenvalues(self, k: int) -> Tensor:
        return self._spectrum._eigenvalues(k)

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        return self._spectrum._sample(n, damping, generator)

    def _scaled(self, scale: float) -> LinearOperator:
        return Rectangular(self.rows.scaled(scale**0.5))
