"""The Riemannian metric that a matrix defines at θ: lengths, angles, and the direction of steepest descent.

With F the Fisher information this is the geometry of the predictive distributions (Amari 1998, "Natural gradient works
efficiently in learning").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import VectorError
from natgrad.operators.checks import check_scalar
from natgrad.operators.hooks import Representation, dot

Vector = TypeVar("Vector", Tensor, Mapping[str, Tensor])
"""A flat vector [P], K of them as columns [P, K], or a mapping of named tensors: what comes in goes out."""


class RiemannianMetric(Representation):
    """What can be measured with A."""

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
        product = dot(left, self._matmul(right))
        return product[0] if single else product

    @final
    def norm(self, v: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "*K"]:
        """The length √(vᵀ A v); of a block [P, K], column by column.

        Raises:
            VectorError: as `@`.
        """
        return self.inner(v, v).clamp_min(0).sqrt()

    @final
    def kl(self, delta: Tensor | Mapping[str, Tensor]) -> Float[Tensor, "*K"]:
        """½ δᵀ A δ: with F the Fisher information, KL(p_θ ‖ p_{θ+δ}) in nats up to O(δ³).

        The true divergence beside it takes the model and data: `natgrad.kl`.

        Args:
            delta: δ, a vector of any kind; of a block [P, K], column by column.

        Raises:
            VectorError: as `@`.
        """
        return 0.5 * self.inner(delta, delta).clamp_min(0)

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
        apart, along = (dot(w, self._matmul(w)).clamp_min(0).sqrt() for w in (difference, total))
        angle = 2 * torch.atan2(apart, along)
        return angle[0] if lengths[0].ndim == lengths[1].ndim == 0 else angle

    @final
    def natural_gradient(self, gradient: Vector, damping: float = 0.0) -> Vector:
        """(A + λI)⁻¹ g: the gradient with respect to this metric, whose negative is the way of steepest descent.

        Args:
            gradient: g, the ordinary gradient, of any kind.
            damping: λ ≥ 0.

        Raises:
            VectorError, ConfigError, NotPositiveDefiniteError: as `solve`.
        """
        check_scalar("damping", damping)
        rows, restore = self._rows(gradient)
        return restore(self._solve(rows, float(damping)))
