"""The factored Tikhonov inverse of a Kronecker block: what an optimiser applies to a gradient in every step.

Martens & Grosse 2015 ("Optimizing neural networks with Kronecker-factored approximate curvature", arXiv 1503.05671),
§6.3: (A ⊗ G + λI)⁻¹ ≈ (A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ with π² = (tr A/dim A)/(tr G/dim G), which makes the cross terms
that this adds to A ⊗ G + λI small (their eq. 32 and what follows).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, NonFiniteError, NotPositiveDefiniteError
from natgrad.linalg import Stage, cholesky, inverse_from_cholesky, join, kronecker_matmul, map_sizes, split
from natgrad.operators.base import Rows, check_scalar
from natgrad.operators.space import ParameterSpace


class _Layout(TypedDict):
    groups: int
    transposed: bool
    outputs: int | None


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """Which parameter is the weight and which the bias, and how they make V = [W b] (see `linalg.kronecker`).

    Attributes:
        space: weight and perhaps bias.
        weight: the weight's name.
        bias: the bias's name, or None.
        groups: of a grouped convolution.
        transposed: the weight's input axis comes first.
        outputs: of one group, where the weight is flat.
    """

    space: ParameterSpace
    weight: str
    bias: str | None
    groups: int = 1
    transposed: bool = False
    outputs: int | None = None

    @classmethod
    def of(
        cls,
        space: ParameterSpace,
        *,
        groups: int = 1,
        transposed: bool = False,
        outputs: int | None = None,
    ) -> LinearMap:
        """Tells weight from bias by their numbers of axes.

        Raises:
            ConfigError: the space is not one weight and at most one bias, or the groups don't divide it.
        """
        weights = [name for name, shape in space.entries if len(shape) >= 2]
        biases = [name for name, shape in space.entries if len(shape) == 1]
        if len(weights) != 1 or len(biases) > 1 or len(space.names) > 2:
            raise ConfigError(
                f"a Kronecker block has one weight and at most one bias; got {dict(space.entries)}"
            )
        shape = space.shapes[weights[0]]
        if outputs is None and shape[0] % groups:
            raise ConfigError(f"{groups} groups don't divide the first axis of {weights[0]!r}, {shape}")
        if outputs is not None and math.prod(shape) % max(groups * outputs, 1):
            raise ConfigError(f"{weights[0]!r}, {shape}, has no {groups} groups of {outputs} outputs")
        return cls(space, weights[0], biases[0] if biases else None, groups, transposed, outputs)

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of rows and columns of V (of one group): (out/groups, in (+ 1))."""
        shape = self.space.shapes[self.weight]
        out, columns, _ = map_sizes(shape, **self._layout)
        return out, columns + (self.bias is not None)

    def check(self, A: Tensor, G: Tensor) -> None:
        """Sees that two factors, or their diagonals, fit this map.

        Raises:
            ConfigError: says what was expected.
        """
        out, columns = self.sizes
        groups = (self.groups,) if max(A.ndim, G.ndim) == 3 else ()
        expected = tuple(
            (*groups, size, size) if factor.ndim > 1 else (size,) for factor, size in ((A, columns), (G, out))
        )
        if (tuple(A.shape), tuple(G.shape)) != expected:
            raise ConfigError(
                f"factors A {tuple(A.shape)} and G {tuple(G.shape)} don't fit {self.space.label}, which needs "
                f"{expected[0]} (with the bias's coordinate last, if there is one) and {expected[1]}"
            )
        self.check_bias()
        if (A.dtype, A.device) != (G.dtype, G.device):
            raise ConfigError(f"A is {A.dtype} on {A.device}, G {G.dtype} on {G.device}; convert one")

    def check_bias(self) -> None:
        """Sees that a bias has a number for each output.

        Raises:
            ConfigError: says what was expected.
        """
        size = self.sizes[0] * self.groups
        if self.bias is not None and self.space.shapes[self.bias] != (size,):
            raise ConfigError(
                f"the bias {self.bias!r} has shape {self.space.shapes[self.bias]}, not ({size},)"
            )

    @property
    def _layout(self) -> _Layout:
        return {"groups": self.groups, "transposed": self.transposed, "outputs": self.outputs}

    def join(self, rows: Mapping[str, Tensor]) -> Tensor:
        """V [K, (groups,) out, in (+ 1)] from K vectors."""
        bias = None if self.bias is None else rows[self.bias]
        return join(rows[self.weight], bias, batch_dims=1, **self._layout)

    def split(self, V: Tensor) -> Rows:
        """K vectors from V [K, (groups,) out, in (+ 1)]."""
        shape = self.space.shapes[self.weight]
        has_bias = self.bias is not None
        weight, bias = split(V, shape, bias=has_bias, **self._layout)
        return {self.weight: weight} if bias is None else {self.weight: weight, str(self.bias): bias}


class FactoredInverse:
    """(A + π√λ I)⁻¹ ⊗ (G + √λ/π I)⁻¹ for one Kronecker block, as two cached inverses that can be refreshed in place.

    Attributes:
        A_inverse: (A + π√λ I)⁻¹, symmetric; its diagonal where A is one.
        G_inverse: (G + √λ/π I)⁻¹, symmetric; likewise.
        pi: π, one number or one for each group.
        stages: which stage of the fallback each factor needed, by its name "A" or "G".
    """

    def __init__(
        self,
        space: ParameterSpace,
        A: Float[Tensor, "..."],
        G: Float[Tensor, "..."],
        damping: float,
        *,
        transposed: bool = False,
        flat: bool = False,
    ) -> None:
        """Takes the block as `Kronecker` does, or a factor's diagonal, and λ ≥ 0; then as `refresh`.

        Raises:
            ConfigError: the factors don't fit the space; λ is negative or not finite.
            NonFiniteError, NotPositiveDefiniteError: as `refresh`.
        """
        self.map = LinearMap.of(
            space,
            groups=A.shape[0] if A.ndim == 3 else 1,
            transposed=transposed,
            outputs=G.shape[-1] if flat else None,
        )
        self.A_inverse, self.G_inverse = torch.empty_like(A), torch.empty_like(G)
        self.pi = torch.ones(A.shape[:1] if A.ndim == 3 else (), dtype=A.dtype, device=A.device)
        self.stages: dict[str, Stage] = {}
        self._half = torch.empty(0, dtype=A.dtype, device=A.device)  # G⁻¹ V, allocated at the first solve
        self.refresh(A, G, damping)

    @torch.no_grad()
    def refresh(self, A: Float[Tensor, "..."], G: Float[Tensor, "..."], damping: float) -> dict[str, Stage]:
        """Recomputes both inverses in place, for new factors of the same shapes or another λ.

        If it raises, the old inverses are still there, whole.

        Args:
            A: the factor of the inputs, or its diagonal.
            G: the factor of the outputs, or its diagonal.
            damping: λ ≥ 0.

        Returns:
            `stages`.

        Raises:
            ConfigError: the factors don't fit the space; λ is negative or not finite.
            NonFiniteError: a factor has an infinite or undefined entry.
            NotPositiveDefiniteError: a damped factor could not be factorised.
        """
        check_scalar("damping", damping)
        self.map.check(A, G)
        layer, root, pi = self.map.space.label, math.sqrt(damping), balance(A, G)
        done: list[tuple[Tensor, Tensor, Stage]] = []
        for factor, shift, inverse, side in (
            (A, root * pi, self.A_inverse, "A"),
            (G, root / pi, self.G_inverse, "G"),
        ):
            if factor.ndim == 1:
                done.append((inverse, _positive(factor + shift, layer, side), Stage.CHOLESKY))
            else:
                done.append((inverse, *cholesky(factor, shift, layer=layer, factor=side)))
        for inverse, found, _ in done:
            if inverse.ndim == 1:
                torch.reciprocal(found, out=inverse)
            else:
                inverse_from_cholesky(found, out=inverse)
        self.pi, self.stages = pi, {"A": done[0][2], "G": done[1][2]}
        return self.stages

    @torch.no_grad()
    def solve(self, b: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """G⁻¹ V A⁻¹ for V = [W b] made of weight and bias; the result has the dtype of b.

        Args:
            b: the right-hand side by name, such as a gradient.
            out: where the result is written; contiguous tensors of b's shapes, none of them one of b's. A steady state
                without it allocates the result alone, with it nothing.

        Raises:
            VectorError: b does not lie in the block's space.
        """
        self.map.space.check(b)
        if out is None:
            out = {name: torch.empty_like(b[name], memory_format=torch.contiguous_format) for name in b}
        dtype = self.A_inverse.dtype
        plain = self.A_inverse.ndim == self.G_inverse.ndim == 2 and not self.map.transposed
        if plain and all(b[name].dtype == dtype for name in b):
            self._solve_in_place(b, out)
        else:
            V = self.map.join({name: b[name][None].to(dtype) for name in b})
            for name, rows in self.map.split(self._applied(V)).items():
                out[name].copy_(rows[0])
        return {name: out[name] for name in self.map.space.names}

    def _applied(self, V: Tensor) -> Tensor:
        if self.A_inverse.ndim > 1 and self.G_inverse.ndim > 1:
            return kronecker_matmul(self.A_inverse, self.G_inverse, V)
        half = self.G_inverse[:, None] * V if self.G_inverse.ndim == 1 else self.G_inverse @ V
        return half * self.A_inverse if self.A_inverse.ndim == 1 else half @ self.A_inverse

    def _solve_in_place(self, b: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        # Products are written where they belong, into column slices, rather than joined and split by copies: at
        # [1000, 785] in float32 that saves a tenth of the time, most of it page faults of fresh memory.
        rows, columns = self.map.sizes
        if self._half.shape != (rows, columns):
            self._half = self.A_inverse.new_empty(rows, columns)
        weight, bias = self.map.weight, self.map.bias
        inputs = columns - (bias is not None)
        torch.mm(self.G_inverse, b[weight].reshape(rows, inputs), out=self._half[:, :inputs])
        if bias is not None:
            self._half[:, inputs] = self.G_inverse @ b[bias]
            torch.mv(self._half, self.A_inverse[:, inputs], out=out[bias])
        torch.mm(self._half, self.A_inverse[:, :inputs], out=out[weight].view(rows, inputs))


def _positive(diagonal: Tensor, layer: str, factor: str) -> Tensor:
    """A damped diagonal, of which the least entry is looked at."""
    least = float(diagonal.min())
    if not math.isfinite(float(diagonal.sum())):
        raise NonFiniteError(f"the diagonal of factor {factor} of {layer} is not finite")
    if least <= 0.0:
        raise NotPositiveDefiniteError(layer, factor, least)
    return diagonal


def balance(A: Float[Tensor, "..."], G: Float[Tensor, "..."]) -> Float[Tensor, "*groups"]:
    """π = √((tr A/dim A) / (tr G/dim G)), Martens & Grosse 2015, §6.3: how the damping is shared between the factors.

    1 where a trace is zero, as that of G is for a layer whose outputs no loss depends on.
    """
    mean_A, mean_G = ((t if t.ndim == 1 else t.diagonal(dim1=-2, dim2=-1)).mean(-1) for t in (A, G))
    usable = (mean_A > 0) & (mean_G > 0)
    ratio = torch.where(usable, mean_A, 1.0) / torch.where(usable, mean_G, 1.0)
    pi = ratio.sqrt()
    return torch.where(torch.isfinite(pi) & (pi > 0), pi, 1.0)
