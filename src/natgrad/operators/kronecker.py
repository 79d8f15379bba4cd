"""The Kronecker-factored block of one linear map: K-FAC's approximation of its Fisher information."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import eigendecomposition, kronecker_dense, kronecker_matmul
from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import check_room, pseudo_inverse, require_definite, standard_normal
from natgrad.operators.dense import Dense
from natgrad.operators.eigen import EigenKronecker, assemble, in_basis
from natgrad.operators.factored import FactoredInverse, LinearMap
from natgrad.operators.hooks import Rows
from natgrad.operators.space import ParameterSpace


class Eigenbasis(NamedTuple):
    """The eigendecompositions A = Q_A Λ_A Q_Aᵀ and G = Q_G Λ_G Q_Gᵀ; eigenvalues ascending and not negative."""

    values_A: Tensor
    vectors_A: Tensor
    values_G: Tensor
    vectors_G: Tensor

    def products(self) -> Tensor:
        """All λ_G λ_A, the eigenvalues of A ⊗ G, in V's layout [(groups,) out, in (+ 1)]."""
        return self.values_G[..., :, None] * self.values_A[..., None, :]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Kronecker(LinearOperator):
    """A ⊗ G on one weight and, if there is one, its bias: V ↦ G V A with V = [W b] (see `linalg.kronecker`).

    Solves are exact, (A ⊗ G + λI)⁻¹ in the eigenbasis of both factors, which is computed at the first need and kept.
    For an optimiser's every step `factored` is cheaper.

    Attributes:
        space: the weight, of two or more axes, and perhaps the bias, of one.
        A: the factor of the inputs, [in (+ 1), in (+ 1)] with the homogeneous coordinate last if there is a bias; for a
            convolution in counts patches, in·kh·kw. With groups, one factor for each: [groups, in (+ 1), in (+ 1)].
        G: the factor of the outputs, [out, out]; with groups [groups, out/groups, out/groups].
        transposed: the weight is stored with its input axis first (`ConvTranspose2d`, Hugging Face's `Conv1D`).
        flat: the weight has several axes of groups, inputs or outputs (see `linalg.kronecker`).

    Raises:
        ConfigError: the factors don't fit the space, or one another.
    """

    space: ParameterSpace
    A: Float[Tensor, "*groups i i"]
    G: Float[Tensor, "*groups o o"]
    transposed: bool = False
    flat: bool = False

    def __post_init__(self) -> None:
        if self.A.ndim == self.G.ndim == 3 and len(self.A) == 1:  # one group is no group
            object.__setattr__(self, "A", self.A[0])
            object.__setattr__(self, "G", self.G[0])
        self._map.check(self.A, self.G)

    @functools.cached_property
    def _map(self) -> LinearMap:
        groups = self.A.shape[0] if self.A.ndim == 3 else 1
        outputs = self.G.shape[-1] if self.flat else None
        return LinearMap.of(self.space, groups=groups, transposed=self.transposed, outputs=outputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.A.device

    @functools.cached_property
    def eigenbasis(self) -> Eigenbasis:
        """The eigendecompositions of both factors.

        Raises:
            NonFiniteError: a factor has an infinite or undefined entry.
            NotPositiveDefiniteError: a factor is indefinite.
        """
        layer = self.space.label
        return Eigenbasis(
            *eigendecomposition(self.A, layer=layer, factor="A"),
            *eigendecomposition(self.G, layer=layer, factor="G"),
        )

    def factored(self, damping: float) -> FactoredInverse:
        """The inverse with factored damping, (A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹: an approximation of (A ⊗ G + λI)⁻¹.

        Args:
            damping: λ ≥ 0.

        Raises:
            ConfigError, NonFiniteError, NotPositiveDefiniteError: as `FactoredInverse`.
        """
        return FactoredInverse(
            self.space, self.A, self.G, damping, transposed=self.transposed, flat=self.flat
        )

    def _damped_products(self, damping: float) -> Tensor:
        basis = self.eigenbasis
        if damping == 0:
            for factor, values in (("A", basis.values_A), ("G", basis.values_G)):
                for one in values.view(-1, values.shape[-1]):
                    least, largest = float(one[0]), float(one[-1])
                    require_definite(
                        least, largest, len(one), self.dtype, layer=self.space.label, factor=factor
                    )
        return basis.products() + damping

    def _matmul(self, rows: Rows) -> Rows:
        return self._map.split(kronecker_matmul(self.A, self.G, self._map.join(rows)))

    def _solve(self, rows: Rows, damping: float) -> Rows:
        return self._with_eigenvalues(rows, self._damped_products(damping).reciprocal_())

    def _with_eigenvalues(self, rows: Rows, values: Tensor) -> Rows:
        _, Q_A, _, Q_G = self.eigenbasis
        return self._map.split(in_basis(Q_A, Q_G, values, self._map.join(rows)))

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        values_A, _, values_G, _ = self.eigenbasis
        if rtol is None:  # what is zero in a factor is zero
            inverse_A, inverse_G = (
                torch.stack(
                    [pseudo_inverse(one, None, len(one)) for one in values.view(-1, values.shape[-1])]
                )
                for values in (values_A, values_G)
            )
            inverse = inverse_G[:, :, None] * inverse_A[:, None, :]
        else:
            products = self.eigenbasis.products()
            inverse = torch.stack(
                [pseudo_inverse(own, rtol, 0) for own in products.view(self._map.groups, -1)]
            )
        return self._with_eigenvalues(rows, inverse.view(*values_A.shape[:-1], *self._map.sizes))

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._with_eigenvalues(rows, (self.eigenbasis.products() + damping).sqrt())

    def inverse(self, damping: float) -> EigenKronecker:
        """(A ⊗ G + λI)⁻¹, exactly.

        Args:
            damping: λ ≥ 0.

        Raises:
            NonFiniteError: a factor has an infinite or undefined entry.
            NotPositiveDefiniteError: a factor is indefinite; or λ is 0 and one is singular.
        """
        values = self._damped_products(damping).reciprocal_()
        _, Q_A, _, Q_G = self.eigenbasis
        return EigenKronecker(self.space, Q_A, Q_G, values, self.transposed, self.flat)

    def _dense(self) -> Tensor:
        check_room(self.space, self.dtype)
        return assemble(self._map, kronecker_dense(self.A, self.G))

    def _diagonal(self) -> dict[str, Tensor]:
        diagonal_A, diagonal_G = (t.diagonal(dim1=-2, dim2=-1) for t in (self.A, self.G))
        rows = self._map.split((diagonal_G[..., :, None] * diagonal_A[..., None, :])[None])
        return {name: d[0] for name, d in rows.items()}

    def _trace(self) -> Tensor:
        trace_A, trace_G = (t.diagonal(dim1=-2, dim2=-1).sum(-1) for t in (self.A, self.G))
        return (trace_A * trace_G).sum()

    def _logdet(self, damping: float) -> Tensor:
        return self._damped_products(damping).log().sum()

    def _eigenvalues(self, k: int) -> Tensor:
        return self.eigenbasis.products().flatten()

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        products = self._damped_products(damping)
        _, Q_A, _, Q_G = self.eigenbasis
        z = standard_normal(n, tuple(products.shape), self.dtype, self.device, generator)
        return self._map.split(kronecker_matmul(Q_A.mT, Q_G, z * products.rsqrt()))

    def _scaled(self, scale: float) -> LinearOperator:
        return dataclasses.replace(self, G=scale * self.G)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        space = self.space.restrict(names)
        if len(names) == 2:  # in the other order
            return dataclasses.replace(self, space=space)
        if names == (self._map.weight,):
            return dataclasses.replace(self, space=space, A=self.A[..., :-1, :-1])
        blocks = self.G * self.A[..., -1:, -1:]
        return Dense(space, torch.block_diag(*blocks) if blocks.ndim == 3 else blocks)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return dataclasses.replace(self, A=self.A.to(device, dtype), G=self.G.to(device, dtype))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"A": self.A, "G": self.G}, {"transposed": self.transposed, "flat": self.flat}

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> Kronecker:
        return cls(space, tensors["A"], tensors["G"], meta["transposed"], meta.get("flat", False))
