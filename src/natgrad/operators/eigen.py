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
from natgrad.operators.checks import (
    check_room,
    check_scalar,
    pseudo_inverse,
    require_definite,
    standard_normal,
)
from natgrad.operators.dense import Dense
from natgrad.operators.diagonal import Diagonal
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
            None stands for the identity, of a side that is too long for a basis of its own; without groups.
        U_G: orthogonal, [out, out]; with groups [groups, out/groups, out/groups]. None as above.
        values: S ≥ 0, [out, in (+ 1)]; with groups [groups, out/groups, in (+ 1)].
        transposed: the weight is stored with its input axis first (`ConvTranspose2d`, Hugging Face's `Conv1D`).
        flat: the weight has several axes of groups, inputs or outputs (see `linalg.kronecker`).

    Raises:
        ConfigError: the bases and eigenvalues don't fit the space, or one another.
    """

    space: ParameterSpace
    U_A: Float[Tensor, "*groups i i"] | None
    U_G: Float[Tensor, "*groups o o"] | None
    values: Float[Tensor, "..."]  # its shape is checked below, so that an error says what it should be
    transposed: bool = False
    flat: bool = False

    def __post_init__(self) -> None:
        if self.values.ndim == 3 and len(self.values) == 1:  # one group is no group
            for name in ("U_A", "U_G", "values"):
                own = getattr(self, name)
                object.__setattr__(self, name, None if own is None else own[0])
        out, columns = self._map.sizes
        groups = (self._map.groups,) if self.values.ndim == 3 else ()
        expected = {
            "U_A": (*groups, columns, columns),
            "U_G": (*groups, out, out),
            "values": (*groups, out, columns),
        }
        for name, shape in expected.items():
            own = getattr(self, name)
            if own is None:
                continue
            if own.shape != shape:
                raise ConfigError(f"{name} is {tuple(own.shape)}; {self.space.label} needs {shape}")
            if (own.dtype, own.device) != (self.dtype, self.device):
                raise ConfigError(
                    f"{name} is {own.dtype} on {own.device}, the eigenvalues {self.dtype} on {self.device}; convert one"
                )
        self._map.check_bias()

    def power(self, exponent: float, damping: float = 0.0) -> EigenKronecker:
        """The operator (A + λI)^exponent; with −1 it is A's damped inverse, with −½ its root.

        Args:
            exponent: any real number; where it is negative, A + λI must be definite.
            damping: λ ≥ 0.

        Raises:
            ConfigError: λ is negative or not finite.
            NotPositiveDefiniteError: A is singular, λ is 0, and the exponent is negative.
        """
        check_scalar("damping", damping)
        values = self._definite(damping) if exponent < 0 else self.values + damping
        return dataclasses.replace(self, values=values.pow(exponent))

    @functools.cached_property
    def _map(self) -> LinearMap:
        groups = self.values.shape[0] if self.values.ndim == 3 else 1
        outputs = self.values.shape[-2] if self.flat else None
        return LinearMap.of(self.space, groups=groups, transposed=self.transposed, outputs=outputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of bases and eigenvalues."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of bases and eigenvalues."""
        return self.values.device

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
        out, columns = self._map.sizes
        U_A, U_G = (
            torch.eye(size, dtype=self.dtype, device=self.device) if own is None else own
            for own, size in ((self.U_A, columns), (self.U_G, out))
        )
        basis = kronecker_dense(U_A.mT, U_G)
        return assemble(self._map, (basis * self.values.flatten(-2)[..., None, :]) @ basis.mT)

    def _diagonal(self) -> dict[str, Tensor]:
        squares = [None if own is None else own.square() for own in (self.U_A, self.U_G)]
        V = _turned(_transposed(squares[0]), squares[1], self.values)
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
        return self._map.split(_turned(_transposed(self.U_A), self.U_G, z * deviations))

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
        if self.U_A is None:
            values = self.values[..., -1:]
        else:
            values = self.values @ self.U_A[..., -1, :, None].square()
        if self.U_G is None:
            return Diagonal(space, space.unflatten(values.flatten()))
        blocks = (self.U_G * values.mT) @ self.U_G.mT
        return Dense(space, torch.block_diag(*blocks) if blocks.ndim == 3 else blocks)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        U_A, U_G = (None if own is None else own.to(device, dtype) for own in (self.U_A, self.U_G))
        return dataclasses.replace(self, U_A=U_A, U_G=U_G, values=self.values.to(device, dtype))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"U_A": self.U_A, "U_G": self.U_G, "values": self.values}
        there = {name: own for name, own in tensors.items() if own is not None}
        return there, {"transposed": self.transposed, "flat": self.flat}

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> EigenKronecker:
        U_A, U_G = tensors.get("U_A"), tensors.get("U_G")
        return cls(space, U_A, U_G, tensors["values"], meta["transposed"], meta.get("flat", False))


def in_basis(
    U_A: Float[Tensor, "*groups i i"] | None,
    U_G: Float[Tensor, "*groups o o"] | None,
    values: Float[Tensor, "*groups o i"],
    V: Float[Tensor, "K *groups o i"],
) -> Float[Tensor, "K *groups o i"]:
    """U_G (S ∘ (U_Gᵀ V U_A)) U_Aᵀ: eigenvalues S in the eigenbasis of a Kronecker product, applied to K matrices V."""
    rotated = _turned(U_A, _transposed(U_G), V)
    return _turned(_transposed(U_A), U_G, rotated * values)


def _turned(A: Tensor | None, G: Tensor | None, V: Tensor) -> Tensor:
    """G V A, where None is the identity."""
    if A is not None and G is not None:
        return kronecker_matmul(A, G, V)
    V = V if G is None else G @ V
    return V if A is None else V @ A


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.mT


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
