"""What an operator is: a symmetric positive semi-definite matrix on parameter space.

Every concrete method is final and stands here, or with the metric in `riemannian`; what a representation defines are
the hooks of `hooks.Representation`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, VectorError
from natgrad.linalg.stochastic import Estimated
from natgrad.operators.checks import check_scalar as check_scalar
from natgrad.operators.checks import pseudo_inverse as pseudo_inverse
from natgrad.operators.checks import require_definite as require_definite
from natgrad.operators.checks import standard_normal as standard_normal
from natgrad.operators.hooks import Rows as Rows
from natgrad.operators.riemannian import RiemannianMetric, Vector

# How many random vectors an estimate takes if it isn't told.
PROBES = 64


class LinearOperator(RiemannianMetric):
    """A symmetric positive semi-definite matrix A of shape [P, P] on a parameter space, in some representation.

    Vectors are flat [P], or K at once as columns [P, K], or mappings of named tensors; an operation returns the kind
    that it was given. With F the Fisher information, entries are in nats per parameter².

    Attributes:
        space: the parameter space.
    """

    @property
    def shape(self) -> torch.Size:
        """[P, P]."""
        return torch.Size((self.space.numel, self.space.numel))

    def __repr__(self) -> str:
        size, where = self.space.numel, f"{self.dtype}, {self.device}".removeprefix("torch.")
        return f"{type(self).__name__}({size} × {size}, {where}, {self.space.label})"

    # -------------------------------------------------------------------------- products and their inverses

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
            NotPositiveDefiniteError: A is singular and λ is 0; `pinv_solve` has an answer there.
        """
        check_scalar("damping", damping)
        rows, restore = self._rows(b)
        return restore(self._solve(rows, float(damping)))

    @final
    def pinv_solve(self, b: Vector, rtol: float | None = None) -> Vector:
        """A⁺ b: of all x that bring A x as near to b as can be, the shortest.

        Args:
            b: the right-hand side.
            rtol: eigenvalues up to this times the largest are taken for zero. A block-diagonal operator does so block
                by block. None for the rounding of the representation: those for which `solve` would raise.

        Raises:
            VectorError: b does not lie in the space, or has another dtype or device.
            ConfigError: rtol is negative or not finite.
        """
        if rtol is not None:
            check_scalar("rtol", rtol)
        rows, restore = self._rows(b)
        return restore(self._pinv_solve(rows, None if rtol is None else float(rtol)))

    @final
    def sqrt_matmul(self, v: Vector, damping: float = 0.0) -> Vector:
        """The product (A + λI)^½ v with the symmetric root; twice, it is that with A + λI.

        Args:
            v: a vector of any kind.
            damping: λ ≥ 0.

        Raises:
            VectorError: v does not lie in the space, or has another dtype or device.
            ConfigError: λ is negative or not finite.
        """
        check_scalar("damping", damping)
        rows, restore = self._rows(v)
        return restore(self._sqrt_matmul(rows, float(damping)))

    # ------------------------------------------------------------------------------------ other operators

    @final
    def damped(self, damping: float) -> LinearOperator:
        """The operator A + λI.

        Raises:
            ConfigError: λ is negative or not finite.
        """
        from natgrad.operators import algebra

        return algebra.damp(self, damping)

    @final
    def inv(self, damping: float = 0.0) -> LinearOperator:
        """The operator (A + λI)⁻¹: the covariance, where A is a precision. Its product is A's solution.

        Args:
            damping: λ ≥ 0.

        Raises:
            ConfigError: λ is negative or not finite.
            NotPositiveDefiniteError: A is singular and λ is 0. It may come with the first question only.
        """
        from natgrad.operators import inverse

        check_scalar("damping", damping)
        return inverse.invert(self, float(damping))

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

    @final
    def restrict(self, names: str | Iterable[str]) -> LinearOperator:
        """The principal submatrix of some parameters: F with all others held where they are.

        Args:
            names: which, in the order of the new space.

        Raises:
            VectorError: a name that is not in the space, or stands twice.
            ConfigError: there is no name.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        if not names:
            raise ConfigError("restrict() needs at least one name of a parameter")
        space = self.space.restrict(names)
        if len(space.names) < len(names):
            twice = sorted({repr(name) for name in names if names.count(name) > 1})
            raise VectorError(f"{', '.join(twice)} stands twice among the names to restrict to")
        return self if space == self.space else self._restricted(names)

    @final
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LinearOperator:
        """The same operator on another device, or in another dtype.

        Args:
            device: where to; None for where it is.
            dtype: of floating point; None for its own.

        Raises:
            ConfigError: the dtype is none of floating point.
        """
        there, kind = torch.device(device or self.device), dtype or self.dtype
        if not kind.is_floating_point:
            raise ConfigError(f"an operator has a dtype of floating point, not {kind}")
        return self if (there, kind) == (self.device, self.dtype) else self._to(kind, there)

    @final
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the operator to one safetensors file; `natgrad.load_operator` reads it.

        Raises:
            ConfigError: safetensors is not installed; or the operator is known by its products alone.
            OSError: the file can't be written.
        """
        from natgrad.operators import saving

        saving.save_operator(self, path)

    # ----------------------------------------------------------------------------------- the matrix itself

    @final
    def to_dense(self) -> Float[Tensor, "P P"]:
        """The matrix, in the order of flat vectors.

        Raises:
            ConfigError: it would not fit in memory.
        """
        return self._dense()

    @final
    def diagonal(self) -> Float[Tensor, "P"]:
        """The diagonal of A, flat."""
        return self.space.flatten_rows({n: d[None] for n, d in self._diagonal().items()})[0]

    @final
    def trace(self) -> Float[Tensor, ""]:
        """The trace of A."""
        return self._trace()

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

    # --------------------------------------------- estimates: with a standard error, where chance has a part

    @final
    def trace_estimate(self, probes: int = PROBES, generator: torch.Generator | None = None) -> Estimated:
        """The trace of A, and its standard error: 0 where the representation has it exactly.

        Args:
            probes: how many random vectors an estimate takes.
            generator: the source of chance, on the operator's device.

        Raises:
            ConfigError: too few probes.
        """
        _check_probes(probes)
        return self._trace_estimate(probes, generator)

    @final
    def logdet_estimate(
        self, damping: float = 0.0, probes: int = PROBES, generator: torch.Generator | None = None
    ) -> Estimated:
        """log det(A + λI) in nats, and its standard error: 0 where the representation has it exactly.

        Args:
            damping: λ ≥ 0.
            probes: how many random vectors an estimate takes.
            generator: the source of chance, on the operator's device.

        Raises:
            ConfigError: λ is negative or not finite, or too few probes.
            NotPositiveDefiniteError: A is singular and λ is 0.
        """
        check_scalar("damping", damping)
        _check_probes(probes)
        return self._logdet_estimate(float(damping), probes, generator)

    @final
    def diagonal_estimate(self, probes: int = PROBES, generator: torch.Generator | None = None) -> Estimated:
        """The diagonal of A, flat, and a standard error for each entry: 0 where the representation has it exactly.

        Args:
            probes: how many random vectors an estimate takes.
            generator: the source of chance, on the operator's device.

        Raises:
            ConfigError: too few probes.
        """
        _check_probes(probes)
        return self._diagonal_estimate(probes, generator)


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise ConfigError(f"probes={probes}: an estimate takes at least one random vector")
