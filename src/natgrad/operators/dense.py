"""The dense operator: the whole matrix, for the exact Fisher of small models and as a yardstick for all others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, NotPositiveDefiniteError
from natgrad.linalg import Stage, cholesky, eigendecomposition
from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import pseudo_inverse, require_definite, standard_normal
from natgrad.operators.hooks import Rows
from natgrad.operators.space import ParameterSpace


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dense(LinearOperator):
    """A matrix [P, P] in the order of flat vectors; solves by Cholesky, in the stages of `linalg.factorise`.

    Attributes:
        space: the parameter space.
        matrix: symmetric positive semi-definite up to rounding. Not to be changed afterwards: its last Cholesky factor
            and its eigendecomposition are kept.

    Raises:
        ConfigError: the matrix is not [P, P].
    """

    space: ParameterSpace
    matrix: Float[Tensor, "P P"]
    _factors: dict[float, tuple[Tensor, Stage]] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        size = self.space.numel
        if self.matrix.shape != (size, size):
            raise ConfigError(f"the matrix is {tuple(self.matrix.shape)}; this space needs ({size}, {size})")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        return self.matrix.device

    def cholesky(self, damping: float = 0.0) -> tuple[Float[Tensor, "P P"], Stage]:
        """The lower Cholesky factor of A + λI, and the stage of the fallback that it took.

        Args:
            damping: λ ≥ 0. The factor for the last λ is kept.

        Raises:
            NotPositiveDefiniteError: A + λI is indefinite; or λ is 0 and A singular to working precision.
            NonFiniteError: A has an infinite or undefined entry.
        """
        if damping not in self._factors:
            try:
                lower, stage = cholesky(self.matrix, damping, layer=self.space.label, factor="F")
            except NotPositiveDefiniteError as error:
                if damping == error.least_eigenvalue == 0:  # a matrix of zeros: singular, and no worse
                    require_definite(0.0, 0.0, 0, self.dtype, layer=self.space.label, factor="F")
                raise
            if damping == 0:
                self._require_regular(lower, stage)
            self._factors.clear()
            self._factors[damping] = lower, stage
        return self._factors[damping]

    def _require_regular(self, lower: Tensor, stage: Stage) -> None:
        # λ_min ≤ the least squared pivot, and λ_max ≥ the length of any column: where these two are far apart the
        # eigenvalues, which cost ten times as much, need not be computed.
        size, precision = self.space.numel, torch.finfo(self.dtype).eps
        pivot = lower.diagonal().square().min()
        if stage is not Stage.CHOLESKY or pivot < 100 * size * precision * self.matrix.norm(dim=0).max():
            values, _ = self._eigen
            least, largest = float(values[0]), float(values[-1])
            require_definite(least, largest, size, self.dtype, layer=self.space.label, factor="F")

    @functools.cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return eigendecomposition(self.matrix, layer=self.space.label, factor="F")

    def _with_eigenvalues(self, rows: Rows, values: Tensor) -> Rows:
        """Q diag(values) Qᵀ v for each of K vectors, with A's eigenvectors Q."""
        vectors = self._eigen[1]
        return self.space.unflatten_rows((self.space.flatten_rows(rows) @ vectors).mul_(values) @ vectors.mT)

    def _matmul(self, rows: Rows) -> Rows:
        return self.space.unflatten_rows(self.space.flatten_rows(rows) @ self.matrix)

    def _solve(self, rows: Rows, damping: float) -> Rows:
        columns = self.space.flatten_rows(rows).mT
        return self.space.unflatten_rows(torch.cholesky_solve(columns, self.cholesky(damping)[0]).mT)

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        return self._with_eigenvalues(rows, pseudo_inverse(self._eigen[0], rtol, self.space.numel))

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._with_eigenvalues(rows, (self._eigen[0] + damping).sqrt())

    def _dense(self) -> Tensor:
        return self.matrix

    def _diagonal(self) -> dict[str, Tensor]:
        return self.space.unflatten(self.matrix.diagonal())

    def _logdet(self, damping: float) -> Tensor:
        return 2 * self.cholesky(damping)[0].diagonal().log().sum()

    def _eigenvalues(self, k: int) -> Tensor:
        return self._eigen[0]

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        # Cov(L⁻ᵀ z) = L⁻ᵀ L⁻¹ = (L Lᵀ)⁻¹.
        z = standard_normal(n, (self.space.numel,), self.dtype, self.device, generator)
        lower = self.cholesky(damping)[0]
        return self.space.unflatten_rows(torch.linalg.solve_triangular(lower.mT, z.mT, upper=True).mT)

    def _scaled(self, scale: float) -> LinearOperator:
        return Dense(self.space, scale * self.matrix)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        chosen = torch.cat([torch.arange(self.space.numel)[self.space.slices[name]] for name in names])
        chosen = chosen.to(self.device)
        return Dense(self.space.restrict(names), self.matrix[chosen[:, None], chosen])

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return Dense(self.space, self.matrix.to(device, dtype))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"matrix": self.matrix}, {}

    @classmethod
    def _from_state(cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Dense:
        return cls(space, tensors["matrix"])
