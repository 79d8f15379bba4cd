"""The exact operator of many parameters and few rows: F = JᵀJ, solved through K = JJᵀ."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.linalg import Stage, cholesky, eigendecomposition
from natgrad.linalg.iterate import conjugate_gradients
from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import pseudo_inverse, require_definite
from natgrad.operators.dense import Dense
from natgrad.operators.hooks import Rows
from natgrad.operators.identity import ScaledIdentity
from natgrad.operators.rowoperator import RowOperator
from natgrad.operators.rows import FactoredRows

# A matrix of more bytes than this is refused: K, or where there are more rows than parameters, F.
LARGEST_BYTES = 2**33
# In mixed precision λ is at least so many times ε‖K‖ of float32, and there are at most so many iterations.
LEAST, ITERATIONS = 10.0, 16
# What of a step, relative to its length, rounding may change before more is done about it: λ is no better known.
UNSEEN = 1e-4


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gram(RowOperator):
    """JᵀJ in terms of its M rows: products by the factored rows, all else by the smaller of JJᵀ and JᵀJ.

    With fewer rows than parameters that is the Gram matrix K = JJᵀ [M, M], the neural tangent kernel, and

        (JᵀJ + λI)⁻¹ = λ⁻¹ (I − Jᵀ (K + λI)⁻¹ J)        (Woodbury),

    whose rounding, which grows as 1/λ, a step of iterative refinement takes back. J itself is never formed. With more
    rows than parameters F [P, P] is the smaller matrix, and stands in for K.

    In mixed precision the least-squares solution takes K and its Cholesky factor in float32, and makes up for that by
    conjugate gradients with the products J(Jᵀw) in float64, to ‖r − (K + λI)w‖ ≤ ε^¾ ‖r‖ (2e-12; Buttari et al. 2008,
    "Using mixed precision for sparse matrix computations to enhance the performance while achieving 64-bit accuracy").
    Where λ is too small for it to converge soon, and for everything else, K is in float64.

    Attributes:
        rows: J.
        precision: "full", or "mixed".

    Raises:
        ConfigError: a matrix that would take more than 8 GiB, when it is needed.
    """

    precision: str = "full"
    _singles: dict[float, Tensor] = dataclasses.field(default_factory=dict, init=False)
    _factors: dict[float, tuple[Tensor, Stage]] = dataclasses.field(default_factory=dict, init=False)

    @functools.cached_property
    def kernel(self) -> Float[Tensor, "M M"]:
        """K = JJᵀ, rows ordered by batch, then signal column, then example."""
        self._require_room(len(self.rows), "the Gram matrix of that many rows")
        return self.rows.gram()

    @functools.cached_property
    def _primal(self) -> Dense | None:
        """F itself, where it is smaller than K."""
        if len(self.rows) < self.space.numel:
            return None
        self._require_room(self.space.numel, "the matrix of that many parameters")
        return Dense(self.space, self.rows.covariance())

    def _require_room(self, side: int, what: str) -> None:
        needed = side**2 * self.rows.itemsize
        if needed > LARGEST_BYTES:
            raise ConfigError(
                f"{what}, {side:,}, would take {needed / 2**30:.1f} GiB ({needed:,} bytes); use metric='sketched' or "
                "'matrixfree', kind='mc' (one row an example), or fewer examples"
            )

    @functools.cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return eigendecomposition(self.kernel, layer=self.space.label, factor="JJᵀ")

    def cholesky(self, damping: float) -> tuple[Float[Tensor, "..."], Stage]:
        """The lower Cholesky factor of K + λI (of F + λI where that is smaller), and the stage that it took.

        Args:
            damping: λ ≥ 0. The factor for the last λ is kept.

        Raises:
            NotPositiveDefiniteError: the matrix is singular: with λ = 0 it always is if there are fewer rows than
                parameters.
        """
        if self._primal is not None:
            return self._primal.cholesky(damping)
        self._require_damping(damping)
        if damping not in self._factors:
            found = cholesky(self.kernel, damping, layer=self.space.label, factor="JJᵀ")
            self._factors.clear()
            self._singles.clear()
            self._factors[damping] = found
        return self._factors[damping]

    def _require_damping(self, damping: float) -> None:
        if damping == 0:  # fewer rows than parameters
            require_definite(0.0, 1.0, len(self.rows), self.dtype, layer=self.space.label, factor="F")

    def _solve(self, rows: Rows, damping: float) -> Rows:
        if self._primal is not None:
            return self._primal._solve(rows, damping)
        solution = self._woodbury(rows, damping)
        image = self.rows.product(solution)
        rest = {name: b - image[name] - damping * solution[name] for name, b in rows.items()}
        correction = self._woodbury(rest, damping)
        return {name: x + correction[name] for name, x in solution.items()}

    def _woodbury(self, rows: Rows, damping: float) -> Rows:
        lower, _ = self.cholesky(damping)
        inner = torch.cholesky_solve(self.rows.matmul(rows).mT, lower).mT
        taken = self.rows.rmatmul(inner)
        return {name: (b - taken[name]) / damping for name, b in rows.items()}

    def _dual_solve(self, targets: Tensor, damping: float, order: float) -> Rows:
        if damping == 0 or order != 1:
            return self._filtered(targets, damping, order)
        if self._primal is not None:
            return self._primal._solve(self.rows.rmatmul(targets), damping)
        if self.precision == "mixed" and self.dtype is torch.float64:
            mixed = self._mixed_solve(targets, damping)
            if mixed is not None:
                return mixed
        lower, _ = self.cholesky(damping)
        weights = torch.cholesky_solve(targets.mT, lower).mT
        found = self.rows.rmatmul(weights)
        rest = targets - self.rows.matmul(found) - damping * weights
        correction = self.rows.rmatmul(torch.cholesky_solve(rest.mT, lower).mT)
        return {name: x.add_(correction[name]) for name, x in found.items()}

    def dual_step(
        self, targets: Float[Tensor, "M"], damping: float
    ) -> tuple[dict[str, Tensor], Float[Tensor, "M"] | None]:
        """Jᵀw with w = (K + λI)⁻¹ r, and J Jᵀw = r − λw: one product with J where `dual_solve` has three.

        The other two make up for what K's own rounding changes, ε tr K / λ of δ or less, and are made where that is
        more than `UNSEEN`.
        """
        if self._primal is not None or self.precision == "mixed" or damping == 0:
            return super().dual_step(targets, damping)
        if not torch.finfo(self.dtype).eps * float(self.kernel.trace()) <= UNSEEN * damping:
            return super().dual_step(targets, damping)
        lower, stage = self.cholesky(damping)
        if stage is not Stage.CHOLESKY:
            return super().dual_step(targets, damping)
        weights = torch.cholesky_solve(targets[:, None], lower)[:, 0]
        found = self.rows.rmatmul(weights[None])
        return {name: x[0] for name, x in found.items()}, targets - damping * weights

    def gradient_norm(self, targets: Float[Tensor, "M"]) -> float:
        """‖Jᵀr‖: the root of rᵀKr, where K is there and the sum keeps enough of its digits.

        Args:
            targets: r, a number for each row.
        """
        if "kernel" in self.__dict__:
            square = float(targets @ (self.kernel @ targets))
            bound = float(self.kernel.trace()) * float(targets @ targets)
            if square * UNSEEN > torch.finfo(self.dtype).eps * bound:
                return math.sqrt(square)
        return math.sqrt(sum(float(v.square().sum()) for v in self.rows.rmatmul(targets[None]).values()))

    def _mixed_solve(self, targets: Tensor, damping: float) -> Rows | None:
        """Jᵀ (K + λI)⁻¹ r by way of K in float32; None where that is no shorter way."""
        single = self._single_rows
        low = targets.float()
        pulled = single.rmatmul(low)
        largest = single.matmul(pulled).square().sum() / sum(
            v.square().sum() for v in pulled.values()
        )  # or less
        if not damping > LEAST * torch.finfo(torch.float32).eps * float(largest):
            return None
        matrix = self._single.clone()
        matrix.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            return None
        weights, record = conjugate_gradients(
            lambda v: torch.add(self.rows.matmul(self.rows.rmatmul(v)), v, alpha=damping),
            targets,
            tolerance=torch.finfo(self.dtype).eps ** 0.75,
            precondition=lambda v: torch.cholesky_solve(v.float().mT, lower).mT.to(v.dtype),
            limit=ITERATIONS,
        )
        if record.reason == "limit":
            return None
        self._singles.clear()
        self._singles[damping] = lower
        return self.rows.rmatmul(weights)

    @functools.cached_property
    def _single_rows(self) -> FactoredRows:
        return self.rows.to(torch.float32, self.device)

    @functools.cached_property
    def _single(self) -> Tensor:
        self._require_room(len(self.rows), "the Gram matrix of that many rows")
        return self._single_rows.gram()

    @property
    def _squares(self) -> Tensor:
        """The squares of J's singular values, ascending, as the smaller of JJᵀ and JᵀJ has them for eigenvalues."""
        return self._eigen[0] if self._primal is None else self._primal._eigen[0]

    def _known(self, squares: Tensor) -> Tensor:
        """Which are not rounding's: below √ε of the largest, J's singular values are lost in either matrix."""
        return squares > len(squares) * torch.finfo(squares.dtype).eps * squares[-1]

    def _filtered(self, targets: Tensor, damping: float, order: float) -> Rows:
        squares = self._squares
        weights = torch.where(self._known(squares), self._filter(squares, damping, order), 0.0)
        if self._primal is not None:
            return self._primal._with_eigenvalues(self.rows.rmatmul(targets), weights)
        vectors = self._eigen[1]
        return self.rows.rmatmul(((targets @ vectors) * weights) @ vectors.mT)

    def effective_rank(self, damping: float) -> int | None:
        """How many singular values of J are above √λ and above √ε S₁, below which JJᵀ and JᵀJ have rounding.

        None after a Cholesky factorisation, which does not tell.
        """
        if damping > 0:
            return None
        return int(self._known(self._squares).sum())

    def stage(self, damping: float) -> Stage:
        """Which stage of the fallback a solution took; without damping, whether directions were left out of it.

        Those that JJᵀ can't tell from rounding may still be J's own: `Rectangular` knows them down to ε S₁.
        """
        if damping > 0:
            return Stage.CHOLESKY if damping in self._singles else self.cholesky(damping)[1]
        gone = 0 if self.rows.removed is None or self._primal is not None else self.rows.removed.shape[1]
        known = int(self._known(self._squares).sum())
        return Stage.CHOLESKY if known >= len(self._squares) - gone else Stage.TRUNCATED

    @property
    def condition(self) -> float:
        """The largest singular value of J over the least that is not rounding; of a Cholesky factor, a lower bound."""
        factors = self._factors if self._primal is None else self._primal._factors
        for lower in [*self._singles.values(), *(lower for lower, _ in factors.values())]:
            diagonal = lower.diagonal()
            return float(diagonal.max() / diagonal.min())
        squares = self._squares
        known = squares[self._known(squares)]
        return float((squares[-1] / known[0]).sqrt()) if len(known) else float("inf")

    def _in_eigenbasis(self, rows: Rows, values: Tensor) -> Rows:
        """Jᵀ U diag(values) Uᵀ J v."""
        vectors = self._eigen[1]
        return self.rows.rmatmul((self.rows.matmul(rows) @ vectors).mul_(values) @ vectors.mT)

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        if self._primal is not None:
            return self._primal._pinv_solve(rows, rtol)
        # (JᵀJ)⁺ = Jᵀ U Λ⁻² Uᵀ J.
        return self._in_eigenbasis(rows, pseudo_inverse(self._eigen[0], rtol, len(self.rows)).square())

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        if self._primal is not None:
            return self._primal._sqrt_matmul(rows, damping)
        # √(s + λ) = √λ + s / (√(s + λ) + √λ) on the rows' space, √λ elsewhere.
        root = damping**0.5
        values = self._eigen[0]
        weights = 1 / ((values + damping).sqrt() + root).clamp_min(torch.finfo(self.dtype).tiny ** 0.5)
        part = self._in_eigenbasis(rows, torch.where(values > 0, weights, 0.0))
        return {name: v + root * rows[name] for name, v in part.items()}

    def _dense(self) -> Tensor:
        return self.rows.covariance() if self._primal is None else self._primal.matrix

    def _logdet(self, damping: float) -> Tensor:
        if self._primal is not None:
            return self._primal._logdet(damping)
        lower, _ = self.cholesky(damping)
        own = 2 * lower.diagonal().log().sum()
        return own + (self.space.numel - len(self.rows)) * own.new_tensor(damping).log()

    def _eigenvalues(self, k: int) -> Tensor:
        if self._primal is not None:
            return self._primal._eigenvalues(k)
        values = self._eigen[0]
        return torch.cat([values, values.new_zeros(max(0, k - len(values)))])

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        if self._primal is not None:
            return self._primal._sample(n, damping, generator)
        self._require_damping(damping)
        return self._solve(self._perturbed(n, damping, generator), damping)

    def _scaled(self, scale: float) -> LinearOperator:
        if scale == 0:
            return ScaledIdentity(self.space, 0.0, dtype=self.dtype, device=self.device)
        return dataclasses.replace(self, rows=self.rows.scaled(scale**0.5))
