"""What an operator is: a symmetric positive semi-definite matrix on parameter space.

Every concrete method is final and stands here; a representation defines the hooks at the end of the class. Hooks see
one form of vector only: named tensors with a leading axis that counts vectors, [K, *shape].
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, NotPositiveDefiniteError, VectorError
from natgrad.operators.space import ParameterSpace

Rows: TypeAlias = dict[str, Tensor]
"""K vectors: each parameter's tensor as [K, *shape]."""

Vector = TypeVar("Vector", Tensor, Mapping[str, Tensor])
"""A flat vector [P], K of them as columns [P, K], or a mapping of named tensors: what comes in goes out."""


class LinearOperator(abc.ABC):
    """A symmetric positive semi-definite matrix A of shape [P, P] on a parameter space, in some representation.

    Vectors are flat [P], or K at once as columns [P, K], or mappings of named tensors; an operation returns the kind
    that it was given. With F the Fisher information, entries are in nats per parameter².

    Attributes:
        space: the parameter space.
    """

    space: ParameterSpace

    @property
    def shape(self) -> torch.Size:
        """[P, P]."""
        return torch.Size((self.space.numel, self.space.numel))

    # ------------------------------------------------------------------------------------------- algebra

    @final
    def __matmul__(self, v: Vector) -> Vector:
        """The product A v.

        Raises:
            VectorError: v does not lie in the space, or has another dtype or device.
        """
        rows, restore = self._rows(v)
        return restore(self._matmul(rows))

    @final
    def solve(self, b: Vector, damping: float = 0.0) -> Vector:
        """The solution (A + λI)⁻¹ b.

        Args:
            b: the right-hand side.
            damping: λ ≥ 0.

        Raises:
            VectorError: b does not lie in the space, or has another dtype or device.
            ConfigError: λ is negative or not finite.
            NotPositiveDefiniteError: A is singular and λ is 0.
        """
        check_scalar("damping", damping)
        rows, restore = self._rows(b)
        return restore(self._solve(rows, float(damping)))

    @final
    def damped(self, damping: float) -> LinearOperator:
        """The operator A + λI.

        Raises:
            ConfigError: λ is negative or not finite.
        """
        from natgrad.operators import algebra

        return algebra.damp(self, damping)

    @final
    def __add__(self, other: LinearOperator) -> LinearOperator:
        """The operator A + B; its closed form stays where there is one.

        Raises:
            ConfigError: B acts on another space, or in another dtype or on another device.
        """
        from natgrad.operators import algebra

        return algebra.add(self, other)

    @final
    def __mul__(self, scale: float) -> LinearOperator:
        """The operator c A.

        Raises:
            ConfigError: c is negative or not finite.
        """
        check_scalar("scale", scale)
        return self._scaled(float(scale))

    @final
    def __rmul__(self, scale: float) -> LinearOperator:
        """The operator c A."""
        return self * scale

    # ----------------------------------------------------------------------------------- the matrix itself

    @final
    def to_dense(self) -> Float[Tensor, "P P"]:
        """The matrix, in the order of flat vectors."""
        return self._dense()

    @final
    def diagonal(self) -> Float[Tensor, "P"]:
        """The diagonal of A, flat."""
        return self.space.flatten_rows({n: d[None] for n, d in self._diagonal().items()})[0]

    @final
    def trace(self) -> Float[Tensor, ""]:
        """The trace of A."""
        return torch.stack([d.sum() for d in self._diagonal().values()]).sum()

    @final
    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """The logarithm of det(A + λI), in nats.

        Args:
            damping: λ ≥ 0.

        Raises:
            ConfigError: λ is negative or not finite.
            NotPositiveDefiniteError: A is singular and λ is 0, so that the value is −∞.
        """
        check_scalar("damping", damping)
        return self._logdet(float(damping))

    @final
    def eigenvalues(self, k: int | None = None) -> Float[Tensor, "k"]:
        """The k largest eigenvalues, in descending order.

        Args:
            k: how many, from 1 to P; None for all.

        Raises:
            ConfigError: k is out of range.
        """
        if k is None:
            k = self.space.numel
        if not 1 <= k <= self.space.numel:
            raise ConfigError(
                f"k is {k}; this operator has from 1 to {self.space.numel} eigenvalues to ask for"
            )
        return self._eigenvalues(k).sort(descending=True).values[:k]

    @final
    def sample(
        self, n: int, damping: float = 0.0, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n P"]:
        """Draws from N(0, (A + λI)⁻¹): what a Laplace approximation needs.

        Args:
            n: how many.
            damping: λ ≥ 0, the prior's precision there.
            generator: the source of chance, on the operator's device.

        Raises:
            ConfigError: n is negative, or λ negative or not finite.
            NotPositiveDefiniteError: A is singular and λ is 0, so that a variance is infinite.
        """
        check_scalar("damping", damping)
        if n < 0:
            raise ConfigError(f"n is {n}; the number of samples can't be negative")
        return self.space.flatten_rows(self._sample(n, float(damping), generator))

    # ------------------------------------------------------------------------- the metric that A defines

    @final
    def inner(
        self, u: Tensor | Mapping[str, Tensor], v: Tensor | Mapping[str, Tensor]
    ) -> Float[Tensor, "*K"]:
        """The inner product uᵀ A v; of blocks [P, K], column by column.

        Args:
            u: a vector of any kind.
            v: a vector of any kind.

        Raises:
            VectorError: as `@`, or the numbers of columns differ.
        """
        left, _ = self._rows(u)
        right, _ = self._rows(v)
        single = all(isinstance(w, Mapping) or w.ndim == 1 for w in (u, v))
        counts = {t.shape[0] for rows in (left, right) for t in rows.values()}
        if len(counts) > 1 and 1 not in counts:
            raise VectorError(f"u and v have different numbers of columns: {sorted(counts)}")
        product = _dot(left, self._matmul(right))
        return product[0] if single else product

    @final
    def norm(self, v: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "*K"]:
        """The length √(vᵀ A v); of a block [P, K], column by column.

        With F the Fisher information, half its square is KL(p_θ ‖ p_{θ+v}) in nats, to second order.

        Raises:
            VectorError: as `@`.
        """
        return self.inner(v, v).clamp_min(0).sqrt()

    @final
    def angle(
        self, u: Tensor | Mapping[str, Tensor], v: Tensor | Mapping[str, Tensor]
    ) -> Float[Tensor, "*K"]:
        """The angle between u and v in radians, from 0 to π; of blocks [P, K], column by column.

        From the sum and the difference of the unit vectors (Kahan 2006, "How futile are mindless assessments of
        roundoff", §12), which unlike the arc cosine loses no digits near 0 and π.

        Raises:
            VectorError: as `inner`, or a vector has length zero in this metric.
        """
        lengths = self.norm(u), self.norm(v)
        if any(bool((length == 0).any()) for length in lengths):
            raise VectorError("a vector of length zero in this metric has no angle")
        units = []
        for w, length in zip((u, v), lengths, strict=True):
            rows, _ = self._rows(w)
            units.append({n: t / length.view(-1, *[1] * (t.ndim - 1)) for n, t in rows.items()})
        difference = {n: a - units[1][n] for n, a in units[0].items()}
        total = {n: a + units[1][n] for n, a in units[0].items()}
        apart, along = (_dot(w, self._matmul(w)).clamp_min(0).sqrt() for w in (difference, total))
        angle = 2 * torch.atan2(apart, along)
        return angle[0] if lengths[0].ndim == lengths[1].ndim == 0 else angle

    # ------------------------------------------------------------------------------------------ plumbing

    def __repr__(self) -> str:
        size, where = self.space.numel, f"{self.dtype}, {self.device}".removeprefix("torch.")
        return f"{type(self).__name__}({size} × {size}, {where}, {self.space.label})"

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
            return space.unflatten_rows(v.mT), lambda rows: space.flatten_rows(rows).mT
        space.check(v)
        for name in space.names:
            self._check_kind(repr(name), v[name])
        rows = {name: v[name][None] for name in space.names}
        return rows, lambda rows: {name: rows[name][0] for name in space.names}

    def _check_kind(self, what: str, tensor: Tensor) -> None:
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise VectorError(
                f"{what} is {tensor.dtype} on {tensor.device}, the operator {self.dtype} on {self.device}; "
                "convert one of them with .to()"
            )

    # --------------------------------------------------------------- hooks: what a representation defines

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix, and of the vectors that it takes."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device of the matrix, and of the vectors that it takes."""

    @abc.abstractmethod
    def _matmul(self, rows: Rows) -> Rows:
        """A v for each of K vectors."""

    @abc.abstractmethod
    def _solve(self, rows: Rows, damping: float) -> Rows:
        """(A + λI)⁻¹ b for each of K vectors."""

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


def _dot(u: Rows, v: Rows) -> Tensor:
    """Σ uᵢ vᵢ for each of K pairs of vectors."""
    products = [u[name] * v[name] for name in u]
    return torch.stack([p.flatten(1).sum(1) if p.ndim > 1 else p for p in products]).sum(0)


def check_scalar(what: str, value: float) -> None:
    """Sees that a damping or a scale keeps an operator positive semi-definite.

    Raises:
        ConfigError: the value is negative or not finite.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{what} is {value}; it must be finite and not negative")


def require_definite(
    least: float, largest: float, size: int, dtype: torch.dtype, *, layer: str, factor: str
) -> None:
    """Sees that an undamped matrix can be inverted: that its least eigenvalue stands out from rounding.

    Args:
        least: its least eigenvalue, or an estimate.
        largest: its largest eigenvalue, or an estimate.
        size: its number of rows n; rounding is taken to be n ε times the largest eigenvalue.
        dtype: what it was computed in.
        layer: the layer (or block) that the message names.
        factor: the factor of it that the message names.

    Raises:
        NotPositiveDefiniteError: it can't.
    """
    if least <= size * torch.finfo(dtype).eps * largest:
        raise NotPositiveDefiniteError(
            layer, factor, least, advice="it is singular to working precision: pass damping > 0"
        )


def standard_normal(
    n: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
) -> Float[Tensor, "n ..."]:
    """n draws of independent standard normal numbers, [n, *shape]."""
    return torch.randn((n, *shape), dtype=dtype, device=device, generator=generator)
