"""The operator of a few large eigenvalues: exact there, and a multiple of the identity on all the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import pseudo_inverse, require_definite, standard_normal
from natgrad.operators.hooks import Rows
from natgrad.operators.space import ParameterSpace


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRank(LinearOperator):
    """U diag(s) Uᵀ + σ(I − UUᵀ) with k orthonormal columns in U: everything has a closed form in O(kP).

    Attributes:
        space: the parameter space.
        vectors: U, as k orthonormal rows in the order of flat vectors. That they are is not checked.
        values: s ≥ 0.
        remainder: σ ≥ 0, the eigenvalue of everything orthogonal to U.
        error: a bound on ‖F − A‖₂ for the F that this represents, or None where none is known.

    Raises:
        ConfigError: vectors and values don't fit the space, or one another; or σ is negative or not finite.
    """

    space: ParameterSpace
    vectors: Float[Tensor, "k P"]
    values: Float[Tensor, "count"]
    remainder: float = 0.0
    error: float | None = None

    def __post_init__(self) -> None:
        expected = (len(self.values), self.space.numel)
        if self.vectors.shape != expected or len(self.values) > self.space.numel:
            raise ConfigError(
                f"the eigenvectors are {tuple(self.vectors.shape)}; this space needs {expected}"
            )
        if not 0 <= self.remainder < float("inf"):
            raise ConfigError(f"remainder is {self.remainder}; it must be finite and not negative")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the eigenvectors."""
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        """The device of the eigenvectors."""
        return self.vectors.device

    @property
    def _others(self) -> int:
        """How many eigenvalues are σ."""
        return self.space.numel - len(self.values)

    def _of(self, rows: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
        """F(A) v for each of K vectors."""
        flat = self.space.flatten_rows(rows)
        rest = function(self.values.new_tensor(self.remainder)) if self._others else self.values.new_zeros(())
        inner = (flat @ self.vectors.mT) * (function(self.values) - rest)
        return self.space.unflatten_rows(torch.addmm(flat * rest, inner, self.vectors))

    def _definite(self, damping: float) -> None:
        if damping == 0:
            values = [float(self.values.min())] if len(self.values) else []
            values += [self.remainder] if self._others else []
            largest = max(float(self.values.max()) if len(self.values) else 0.0, self.remainder)
            size = len(self.values)
            require_definite(min(values), largest, size, self.dtype, layer=self.space.label, factor="F")

    def _matmul(self, rows: Rows) -> Rows:
        return self._of(rows, lambda s: s)

    def _solve(self, rows: Rows, damping: float) -> Rows:
        self._definite(damping)
        return self._of(rows, lambda s: 1 / (s + damping))

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        both = torch.cat([self.values, self.values.new_tensor([self.remainder] if self._others else [])])
        largest = both.max()

        def inverse(s: Tensor) -> Tensor:
            return pseudo_inverse(torch.cat([s.reshape(-1), largest[None]]), rtol, len(both))[:-1].reshape(
                s.shape
            )

        return self._of(rows, inverse)

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._of(rows, lambda s: (s + damping).sqrt())

    def _dense(self) -> Tensor:
        dense = (self.vectors.mT * (self.values - self.remainder)) @ self.vectors
        dense.diagonal().add_(self.remainder)
        return (dense + dense.mT) / 2

    def _diagonal(self) -> dict[str, Tensor]:
        squares = (self.vectors.square() * (self.values - self.remainder)[:, None]).sum(0)
        return self.space.unflatten(squares + self.remainder)

    def _trace(self) -> Tensor:
        return self.values.sum() + self._others * self.remainder

    def _logdet(self, damping: float) -> Tensor:
        self._definite(damping)
        own = (self.values + damping).log().sum()
        if not self._others:
            return own
        return own + self._others * self.values.new_tensor(self.remainder + damping).log()

    def _eigenvalues(self, k: int) -> Tensor:
        rest = self.values.new_full((min(k, self._others),), self.remainder)
        return torch.cat([self.values, rest])

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        self._definite(damping)
        z = standard_normal(n, (self.space.numel,), self.dtype, self.device, generator)
        return self._of(self.space.unflatten_rows(z), lambda s: (s + damping).rsqrt())

    def _scaled(self, scale: float) -> LinearOperator:
        error = None if self.error is None else scale * self.error
        return LowRank(self.space, self.vectors, scale * self.values, scale * self.remainder, error)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        # σI + Uᵀ diag(s − σ) U of some columns of U is again of this kind: the eigenvectors of its small inner matrix.
        rows = self.space.unflatten_rows(self.vectors)
        space = self.space.restrict(names)
        part = space.flatten_rows({name: rows[name] for name in names})
        q, r = torch.linalg.qr(part.mT)  # [P', m], m = min(k, P')
        inner = (r * (self.values - self.remainder)) @ r.mT
        values, weights = torch.linalg.eigh((inner + inner.mT) / 2)
        return LowRank(
            space,
            (q @ weights).mT.flip(0).contiguous(),
            (values.flip(0) + self.remainder).clamp_min(0),
            self.remainder,
            self.error,
        )

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        vectors, values = (t.to(device, dtype) for t in (self.vectors, self.values))
        return LowRank(self.space, vectors, values, self.remainder, self.error)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"vectors": self.vectors, "values": self.values}
        return tensors, {"remainder": self.remainder, "error": self.error}

    @classmethod
    def _from_state(cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]) -> LowRank:
        return cls(space, tensors["vectors"], tensors["values"], meta["remainder"], meta["error"])
