"""What a representation defines: the hooks, and the one form of vector that they see.

That form is named tensors with a leading axis that counts vectors, [K, *shape]. Hooks are called with arguments that
were checked before. Those that end this file have a default for a matrix that is known exactly; a representation that
knows better, or less, puts its own in its place.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from natgrad.errors import VectorError
from natgrad.linalg.stochastic import Estimated, exactly
from natgrad.operators.space import ParameterSpace

if TYPE_CHECKING:
    from natgrad.operators.base import LinearOperator

Rows: TypeAlias = dict[str, Tensor]
"""K vectors: each parameter's tensor as [K, *shape]."""


class Representation(abc.ABC):
    """A symmetric positive semi-definite matrix A of shape [P, P] on a parameter space.

    Attributes:
        space: the parameter space.
    """

    space: ParameterSpace

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix, and of the vectors that it takes."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device of the matrix, and of the vectors that it takes."""

    # ------------------------------------------------------------------------------------------- vectors

    @final
    def _rows(self, v: Tensor | Mapping[str, Tensor]) -> tuple[Rows, Callable[[Rows], Any]]:
        """The vectors in the form that hooks take, and the way back to the kind that was given."""
        space = self.space
        if isinstance(v, Tensor):
            if v.ndim not in (1, 2):
                raise VectorError(
                    f"a vector is flat [P], a block [P, K] or a mapping; this has {v.ndim} axes"
                )
            self._check_kind("the vector", v)
            if v.ndim == 1:
                return space.unflatten_rows(v[None]), lambda rows: space.flatten_rows(rows)[0]
            if v.shape[0] != space.numel == v.shape[1]:
                raise VectorError(
                    f"a block has vectors of {space.numel} entries as its columns, [P, K], but this is "
                    f"{tuple(v.shape)}; pass its transpose"
                )
            return space.unflatten_rows(v.mT), lambda rows: space.flatten_rows(rows).mT
        space.check(v)
        for name in space.names:
            self._check_kind(repr(name), v[name])
        rows = {name: v[name][None] for name in space.names}
        return rows, lambda rows: {name: rows[name][0] for name in space.names}

    @final
    def _check_kind(self, what: str, tensor: Tensor) -> None:
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise VectorError(
                f"{what} is {tensor.dtype} on {tensor.device}, the operator {self.dtype} on {self.device}; "
                "convert one of them with .to()"
            )

    # --------------------------------------------------------------- hooks: what a representation defines

    @abc.abstractmethod
    def _matmul(self, rows: Rows) -> Rows:
        """A v for each of K vectors."""

    @abc.abstractmethod
    def _solve(self, rows: Rows, damping: float) -> Rows:
        """(A + λI)⁻¹ b for each of K vectors."""

    @abc.abstractmethod
    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        """(A + λI)^½ v, the symmetric root, for each of K vectors."""

    @abc.abstractmethod
    def _dense(self) -> Tensor:
        """[P, P], in the order of flat vectors."""

    @abc.abstractmethod
    def _diagonal(self) -> dict[str, Tensor]:
        """The diagonal, each parameter's part in its shape."""

    @abc.abstractmethod
    def _logdet(self, damping: float) -> Tensor:
        """log det(A + λI)."""

    @abc.abstractmethod
    def _eigenvalues(self, k: int) -> Tensor:
        """The k largest eigenvalues, or more, in any order."""

    @abc.abstractmethod
    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        """n draws from N(0, (A + λI)⁻¹)."""

    @abc.abstractmethod
    def _scaled(self, scale: float) -> LinearOperator:
        """The operator c A in the same representation."""

    @abc.abstractmethod
    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        """The principal submatrix of some parameters, none of them twice, in their order."""

    @abc.abstractmethod
    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        """The same operator in another dtype, or on another device."""

    @abc.abstractmethod
    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What to save: named tensors, and what else `_from_state` needs, as JSON can hold it."""

    @classmethod
    @abc.abstractmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> LinearOperator:
        """The operator of a `_state`."""

    # ------------------------------------------------------------------------------ hooks with a default

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        """A⁺ b for each of K vectors; eigenvalues up to rtol times the largest count as zero."""
        from natgrad.operators.dense import Dense

        return Dense(self.space, self._dense())._pinv_solve(rows, rtol)

    def _trace(self) -> Tensor:
        """The trace of A."""
        return torch.stack([d.sum() for d in self._diagonal().values()]).sum()

    def _trace_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        """The trace of A from random probes; exact here."""
        return exactly(self._trace())

    def _logdet_estimate(self, damping: float, probes: int, generator: torch.Generator | None) -> Estimated:
        """Log det(A + λI) from random probes; exact here."""
        return exactly(self._logdet(damping))

    def _diagonal_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        """The diagonal of A, flat, from random probes; exact here."""
        return exactly(self.space.flatten_rows({n: d[None] for n, d in self._diagonal().items()})[0])


def dot(u: Rows, v: Rows) -> Tensor:
    """Σ uᵢ vᵢ for each of K pairs of vectors."""
    products = [u[name] * v[name] for name in u]
    return torch.stack([p.flatten(1).sum(1) if p.ndim > 1 else p for p in products]).sum(0)
