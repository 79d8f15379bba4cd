"""The exact operator of many rows and many parameters: F = JᵀJ, solved by iteration through a sketch of JJᵀ."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, ConvergenceWarning
from natgrad.linalg.iterate import Convergence, conjugate_gradients
from natgrad.linalg.lanczos import norm_bound
from natgrad.linalg.nystrom import Nystrom
from natgrad.linalg.stochastic import Estimated
from natgrad.operators.base import LinearOperator
from natgrad.operators.hooks import Rows
from natgrad.operators.matrixfree import MatrixFree
from natgrad.operators.rowoperator import RowOperator

# Steps of iterative refinement at most, where F + λI is solved through K + λI.
REFINEMENTS = 4
# A sketch that stands in for K goes on until its least eigenvalue is so small next to λ.
NEGLIGIBLE = 0.1
# Lanczos steps that bound what a sketch leaves out.
BOUND_STEPS = 12


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sketched(RowOperator):
    """JᵀJ in terms of its M rows, where neither JᵀJ nor JJᵀ fits: products alone, and few of them.

    K = JJᵀ is approximated by a randomised Nyström sketch, whose rank follows the damping, and (K + λI) w = r is then
    solved by conjugate gradients with the sketch as preconditioner. The solution is that of `Gram`, to the tolerance;
    memory is O(M · rank). Where rows are damped lightly and K's eigenvalues fall off fast, it takes a fraction of the
    products that plain conjugate gradients take.

    With ``iterations=0`` the sketch stands in for K ("sketch and solve"): cheaper, and only as good as the eigenvalues
    that it leaves out are small next to λ. The operator is then still F, but its solutions are approximate.

    Determinants, spectra, roots and pseudo-inverses are `MatrixFree`'s, and so are undamped solutions with F.

    Attributes:
        rows: J.
        rank: of the first sketch; it is doubled where the damping asks for more.
        largest: the most that the rank is raised to.
        iterations: the most of a solution. Where they are used up, a ConvergenceWarning says how far it came.
        tolerance: of solutions: ‖r − (K + λI) w‖ ≤ tolerance · ‖r‖; by default ε^¾, 2e-12 in float64.
        seed: of the sketch's directions; the same rows give the same solutions.

    Raises:
        ConfigError: an option is out of range.

    Source: Frangella, Tropp & Udell 2023, "Randomized Nyström preconditioning", arXiv 2110.02820.
    """

    rank: int = 32
    largest: int = 1024
    iterations: int = 1000
    tolerance: float | None = None
    seed: int = 0
    _record: list[Convergence] = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sketch(self.rank, self.largest, self.iterations, self.tolerance)

    @property
    def convergence(self) -> Convergence | None:
        """How the last solution went, or None before the first."""
        return self._record[-1] if self._record else None

    @functools.cached_property
    def sketch(self) -> Nystrom:
        """The approximation of K; its rank grows with what is asked of it."""
        return Nystrom(
            self._kernel_product,
            len(self.rows),
            rank=self.rank,
            largest=self.largest,
            bound=self.space.numel,
            dtype=self.dtype,
            device=self.device,
            generator=torch.Generator(device=self.device).manual_seed(self.seed),
        )

    def _kernel_product(self, v: Float[Tensor, "k M"]) -> Float[Tensor, "k M"]:
        return self.rows.matmul(self.rows.rmatmul(v))

    @functools.cached_property
    def _free(self) -> MatrixFree:
        return MatrixFree(self.space, None, self.rows, dtype=self.dtype, device=self.device)

    @property
    def condition(self) -> float:
        """The largest singular value of J over the least that the sketch has met: a lower bound."""
        values = self.sketch.values
        above = values[values > len(self.rows) * torch.finfo(values.dtype).eps * values[0]]
        return float((values[0] / above[-1]).sqrt()) if len(above) else float("inf")

    # ----------------------------------------------------------------------------------------- solutions

    @property
    def _tolerance(self) -> float:
        return torch.finfo(self.dtype).eps ** 0.75 if self.tolerance is None else self.tolerance

    def _weights(self, targets: Float[Tensor, "k M"], damping: float) -> Float[Tensor, "k M"]:
        """(K + λI)⁻¹ r."""
        if not self.iterations:
            return self.sketch.extend(NEGLIGIBLE * damping, math.inf).solve(targets, damping)
        sketch = self.sketch.extend(damping)
        found, record = conjugate_gradients(
            lambda v: torch.add(self._kernel_product(v), v, alpha=damping),
            targets,
            tolerance=self._tolerance,
            precondition=lambda v: sketch.solve(v, damping),
            limit=self.iterations,
        )
        self._record[:] = [record]
        if record.reason == "limit":
            warnings.warn(
                f"the solution is not as exact as asked for ({self._tolerance:.2g}): {record}; pass more damping, a "
                f"larger rank than {len(sketch)} (largest=), more iterations, or a larger tolerance",
                ConvergenceWarning,
                stacklevel=2,
            )
        return found

    def _dual_solve(self, targets: Tensor, damping: float, order: float) -> Rows:
        if damping == 0 or order != 1:
            return self._filtered(targets, damping, order)
        return self.rows.rmatmul(self._weights(targets, damping))

    def _filtered(self, targets: Tensor, damping: float, order: float) -> Rows:
        """By all eigenvalues of K, where these are few enough: conjugate gradients know of no such filter."""
        sketch = self.sketch.extend(0.0)
        if not sketch.complete:
            raise ConfigError(
                "undamped, or with an order other than 1, a solution takes all eigenvalues of JJᵀ, and more than "
                f"largest={self.largest} of its {len(self.rows):,} are above rounding; pass damping > 0 and order 1, "
                "raise that limit, or use metric='gram'"
            )
        values, vectors = sketch.values, sketch.vectors
        known = values > len(self.rows) * torch.finfo(values.dtype).eps * values[0]
        weights = torch.where(known, self._filter(values, damping, order), 0.0)
        return self.rows.rmatmul((targets @ vectors.mT * weights) @ vectors)

    def _solve(self, rows: Rows, damping: float) -> Rows:
        if damping == 0:
            return self._free._solve(rows, damping)
        b = self.space.flatten_rows(rows)
        if not self.iterations:
            return self.space.unflatten_rows(self._bounded_woodbury(b, damping))
        solution, last = torch.zeros_like(b), b.norm(dim=1)
        rest, least = b, self._tolerance * last
        for _ in range(REFINEMENTS):
            trial = solution + self._woodbury(rest, damping)
            remaining = b - self._product(trial) - damping * trial
            left = remaining.norm(dim=1)
            better = left < last
            solution = torch.where(better[:, None], trial, solution)
            if bool((~better | (left <= least) | (left > 0.5 * last)).all()):
                break
            rest, last = torch.where(better[:, None], remaining, rest), torch.minimum(left, last)
        return self.space.unflatten_rows(solution)

    def _product(self, v: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        return self.space.flatten_rows(self.rows.product(self.space.unflatten_rows(v)))

    def _woodbury(self, b: Float[Tensor, "k P"], damping: float) -> Float[Tensor, "k P"]:
        """λ⁻¹ (b − Jᵀ (K + λI)⁻¹ J b)."""
        images = self.rows.matmul(self.space.unflatten_rows(b))
        return (b - self.space.flatten_rows(self.rows.rmatmul(self._weights(images, damping)))) / damping

    def _bounded_woodbury(self, b: Float[Tensor, "k P"], damping: float) -> Float[Tensor, "k P"]:
        """The same with K̂ + eI for K, e ≥ ‖K − K̂‖: it is positive definite, as K alone does not see to."""
        sketch = self.sketch.extend(NEGLIGIBLE * damping, math.inf)
        missing = norm_bound(
            lambda v: self._kernel_product(v) - sketch.approximation(v),
            len(self.rows),
            dtype=self.dtype,
            device=self.device,
            generator=torch.Generator(device=self.device).manual_seed(self.seed),
            steps=BOUND_STEPS,
        )
        images = self.rows.matmul(self.space.unflatten_rows(b))
        weights = sketch.solve(images, damping + missing, remainder=0.0)
        return (b - self.space.flatten_rows(self.rows.rmatmul(weights))) / damping

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        if damping == 0 or not self.iterations:
            return self._free._sample(n, damping, generator)
        return self._solve(self._perturbed(n, damping, generator), damping)

    # ------------------------------------------------------------------------------------- by MatrixFree

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        return self._free._pinv_solve(rows, rtol)

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._free._sqrt_matmul(rows, damping)

    def _dense(self) -> Tensor:
        return self._free._dense()

    def _logdet(self, damping: float) -> Tensor:
        return self._free._logdet(damping)

    def _logdet_estimate(self, damping: float, probes: int, generator: torch.Generator | None) -> Estimated:
        return self._free._logdet_estimate(damping, probes, generator)

    def _eigenvalues(self, k: int) -> Tensor:
        return self._free._eigenvalues(k)

    def _scaled(self, scale: float) -> LinearOperator:
        return dataclasses.replace(self, rows=self.rows.scaled(scale**0.5))


def check_sketch(rank: int, largest: int, iterations: int, tolerance: float | None) -> None:
    """Raises ConfigError unless the options of a sketch are in their range."""
    if rank < 1 or largest < rank:
        raise ConfigError(f"rank={rank} must be positive, and largest={largest} not below it")
    if iterations < 0 or (tolerance is not None and not 0 < tolerance < 1):
        raise ConfigError(
            f"iterations={iterations} can't be negative, and tolerance={tolerance} lies in (0, 1)"
        )
