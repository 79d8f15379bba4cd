"""The Kronecker-factored block of one linear map: K-FAC's approximation of its Fisher information."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import eigendecomposition, kronecker_dense, kronecker_matmul
from natgrad.operators.base import LinearOperator, Rows, require_definite, standard_normal
from natgrad.operators.factored import FactoredInverse, LinearMap
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

    Raises:
        ConfigError: the factors don't fit the space, or one another.
    """

    space: ParameterSpace
    A: Float[Tensor, "*groups i i"]
    G: Float[Tensor, "*groups o o"]
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.A.ndim == self.G.ndim == 3 and len(self.A) == 1:  # one group is no group
            object.__setattr__(self, "A", self.A[0])
            object.__setattr__(self, "G", self.G[0])
        self._map.check(self.A, self.G)

    @functools.cached_property
    def _map(self) -> LinearMap:
        groups = self.A.shape[0] if self.A.ndim == 3 else 1
        return LinearMap.of(self.space, groups=groups, transposed=self.transposed)

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
        return FactoredInverse(self.space, self.A, self.G, damping, transposed=self.transposed)

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
        products = self._damped_products(damping)
        _, Q_A, _, Q_G = self.eigenbasis
        rotated = kronecker_matmul(Q_A, Q_G.mT, self._map.join(rows))
        return self._map.split(kronecker_matmul(Q_A.mT, Q_G, rotated.div_(products)))

    def _dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        # Where each entry of V lies in a flat vector: the bias is V's last column, but stands apart there.
        places = self.space.unflatten_rows(torch.arange(self.space.numel, device=self.device)[None])
        blocks = kronecker_dense(self.A, self.G)
        size = blocks.shape[-1]
        for place, block in zip(
            self._map.join(places).reshape(-1, size), blocks.reshape(-1, size, size), strict=True
        ):
            dense[place[:, None], place] = block
        return dense

    def _diagonal(self) -> dict[str, Tensor]:
        diagonal_A, diagonal_G = (t.diagonal(dim1=-2, dim2=-1) for t in (self.A, self.G))
        rows = self._map.split((diagonal_G[..., :, None] * diagonal_A[..., None, :])[None])
        return {name: d[0] for name, d in rows.items()}

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
        return Kronecker(self.space, self.A, scale * self.G, self.transposed)
