"""A Kronecker-factored eigenbasis with eigenvalues of its own: EKFAC's block of one linear map.

George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis" (arXiv 1806.03884).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.linalg import kronecker_dense, kronecker_matmul
from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import check_room, pseudo_inverse, require_definite, standard_normal
from natgrad.operators.dense import Dense
from natgrad.operators.factored import LinearMap
from natgrad.operators.hooks import Rows
from natgrad.operators.space import ParameterSpace


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EigenKronecker(LinearOperator):
    """(U_A ⊗ U_G) diag(S) (U_A ⊗ U_G)ᵀ on one weight and perhaps its bias: V ↦ U_G (S ∘ (U_Gᵀ V U_A)) U_Aᵀ.

    V = [W b] as in `linalg.kronecker`. With S_oi = λ_o(G) λ_i(A) it is K-FAC's A ⊗ G; EKFAC's S is the diagonal of F
    in this basis (George et al. 2018, §3.2). The eigendecomposition being at hand, everything has a closed form.

    Attributes:
        space: the weight, of two or more axes, and perhaps the bias, of one.
        U_A: orthogonal, [in (+ 1), in (+ 1)], eigenvectors in columns; with groups [groups, in (+ 1), in (+ 1)].
            Neither that it is orthogonal is checked nor the sign of S: metrics hand out operators too often for that.
        U_G: orthogonal, [out, out]; with groups [groups, out/groups, out/groups].
        values: S ≥ 0, [out, in (+ 1)]; with groups [groups, out/groups, in (+ 1)].
        transposed: the weight is stored with its input axis first (`ConvTranspose2d`, Hugging Face's `Conv1D`).

    Raises:
        ConfigError: the bases and eigenvalues don't fit the space, or one another.
    """

    space: ParameterSpace
    U_A: Float[Tensor, "*groups i i"]
    U_G: Float[Tensor, "*groups o o"]
    values: Float[Tensor, "..."]  # its shape is checked below, so that an error says what it should be
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.U_A.ndim == 3 and len(self.U_A) == 1:  # one group is no group
            for name in ("U_A", "U_G", "values"):
                object.__setattr__(self, name, getattr(self, name)[0])
        self._map.check(self.U_A, self.U_G)
        expected = (*self.U_A.shape[:-2], *self._map.sizes)
        if self.values.shape != expected:
            raise ConfigError(
                f"the eigenvalues are {tuple(self.values.shape)}; {self.space.label} needs {expected}"
            )
        if (self.values.dtype, self.values.device) != (self.dtype, self.device):
            raise ConfigError(
                f"U_A is {self.dtype} on {self.device}, the eigenvalues {self.values.dtype} on "
                f"{self.values.device}; convert one"
            )

    @functools.cached_property
    def _map(self) -> LinearMap:
        groups = self.U_A.shape[0] if self.U_A.ndim == 3 else 1
        return LinearMap.of(self.space, groups=groups, transposed=self.transposed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bases."""
        return self.U_A.dtype

    @property
    def device(self) -> torch.device:
        """The device of the bases."""
        return self.U_A.device

    def _of_groups(self) -> Tensor:
        """S as [groups, out/groups · in (+ 1)]."""
        return self.values.reshape(self._map.groups, -1)

    def _definite(self, damping: float) -> Tensor:
        if damping == 0:
            for own in self._of_groups():
                least, largest = (float(value) for value in own.aminmax())
                require_definite(
                    least, largest, max(self._map.sizes), self.dtype, layer=self.space.label, factor="S"
                )
        return self.values + damping

    def _with_eigenvalues(self, rows: Rows, values: Tensor) -> Rows:
        return self._map.split(in_basis(self.U_A, self.U_G, values, self._map.join(rows)))

    def _matmul(self, rows: Rows) -> Rows:
        return self._with_eigenvalues(rows, self.values)

    def _solve(self, rows: Rows, damping: float) -> Rows:
        return self._with_eigenvalues(rows, self._definite(damping).reciprocal())

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        size = max(self._map.sizes)
        inverse = torch.stack([pseudo_inverse(own, rtol, size) for own in self._of_groups()])
        return self._with_eigenvalues(rows, inverse.view_as(self.values))

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._with_eigenvalues(rows, (self.values + damping).sqrt())

    def _dense(self) -> Tensor:
        check_room(self.space, self.dtype)
        basis = kronecker_dense(self.U_A.mT, self.U_G)
        return assemble(self._map, (basis * self.values.flatten(-2)[..., None, :]) @ basis.mT)

    def _diagonal(self) -> dict[str, Tensor]:
        V = kronecker_matmul(self.U_A.square().mT, self.U_G.square(), self.values)
        return {name: d[0] for name, d in self._map.split(V[None]).items()}

    def _trace(self) -> Tensor:
        return self.values.sum()

    def _logdet(self, damping: float) -> Tensor:
        return self._definite(damping).log().sum()

    def _eigenvalues(self, k: int) -> Tensor:
        return self.values.flatten()

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        deviations = self._definite(damping).rsqrt()
        z = standard_normal(n, tuple(deviations.shape), self.dtype, self.device, generator)
        return self._map.split(kronecker_matmul(self.U_A.mT, self.U_G, z * deviations))

    def _scaled(self, scale: float) -> LinearOperator:
        return dataclasses.replace(self, values=scale * self.values)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        from natgrad.operators.restricted import Restricted

        space = self.space.restrict(names)
        if len(names) == 2:  # in the other order
            return dataclasses.replace(self, space=space)
        if names == (self._map.weight,):
            return Restricted(self, names)
        # The bias is V's last column, so its block is U_G diag(S u²) U_Gᵀ with u the last row of U_A.
        values = self.values @ self.U_A[..., -1, :, None].square()
        blocks = (self.U_G * values.mT) @ self.U_G.mT
        return Dense(space, torch.block_diag(*blocks) if blocks.ndim == 3 else blocks)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        tensors = {name: getattr(self, name).to(device, dtype) for name in ("U_A", "U_G", "values")}
        return dataclasses.replace(self, **tensors)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"U_A": self.U_A, "U_G": self.U_G, "values": self.values}
        return tensors, {"transposed": self.transposed}

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> EigenKronecker:
        return cls(space, tensors["U_A"], tensors["U_G"], tensors["values"], meta["transposed"])


def in_basis(
    U_A: Float[Tensor, "*groups i i"],
    U_G: Float[Tensor, "*groups o o"],
    values: Float[Tensor, "*groups o i"],
    V: Float[Tensor, "K *groups o i"],
) -> Float[Tensor, "K *groups o i"]:
    """U_G (S ∘ (U_Gᵀ V U_A)) U_Aᵀ: eigenvalues S in the eigenbasis of a Kronecker product, applied to K matrices V."""
    rotated = kronecker_matmul(U_A, U_G.mT, V)
    return kronecker_matmul(U_A.mT, U_G, rotated.mul_(values))


def assemble(linear_map: LinearMap, blocks: Float[Tensor, "*groups oi oi"]) -> Float[Tensor, "P P"]:
    """The matrix in the order of flat vectors from that on V flattened by rows, one for each group."""
    size, space = blocks.shape[-1], linear_map.space
    dense = blocks.new_zeros(space.numel, space.numel)
    # Where each entry of V lies in a flat vector: the bias is V's last column, but stands apart there.
    places = space.unflatten_rows(torch.arange(space.numel, device=blocks.device)[None])
    for place, block in zip(
        linear_map.join(places).reshape(-1, size), blocks.reshape(-1, size, size), strict=True
    ):
        dense[place[:, None], place] = block
    return dense
