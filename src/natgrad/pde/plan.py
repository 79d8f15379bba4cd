"""Which derivatives a jet carries: first ones along K directions, and L weighted sums of the second ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """The derivatives that are carried through a network, one stream each.

    Stream l of the second order is Σ_k w[l, k] ∂²u/∂v_k², which is linear in second derivatives, so that one stream
    does for the whole sum (Dangel et al. 2025, "Collapsing Taylor mode automatic differentiation").

    Attributes:
        directions: K.
        seconds: L; 0 where no second derivative is carried.
        used: the directions, from start to stop, outside which w is zero.
        kind: what w is there: ``"sum"`` (one row of ones), ``"each"`` (the identity), ``"mixed"``.
        weights: w there.
    """

    directions: int
    seconds: int = 0
    used: tuple[int, int] = (0, 0)
    kind: str = "mixed"
    weights: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, directions: int, weights: Sequence[Sequence[float]] | None) -> Plan:
        """The plan for these weights [L, K]; what they are like is found out here, once."""
        if not weights:
            return cls(directions)
        needed = [k for k in range(directions) if any(row[k] for row in weights)] or [0]
        start, stop = needed[0], needed[-1] + 1
        inner = tuple(tuple(row[start:stop]) for row in weights)
        L, width = len(inner), stop - start
        if L == 1 and all(w == 1 for w in inner[0]):
            kind = "sum"
        elif width == L and all(w == (i == j) for i, row in enumerate(inner) for j, w in enumerate(row)):
            kind = "each"
        else:
            kind = "mixed"
        return cls(directions, L, (start, stop), kind, inner)

    def select(self, first: Float[Tensor, "n k ..."]) -> Float[Tensor, "n u ..."]:
        """Of one thing for each direction, those that second derivatives need."""
        start, stop = self.used
        return first if stop - start == self.directions else first[:, start:stop]

    def combine(self, pure: Float[Tensor, "n u ..."]) -> Float[Tensor, "n l ..."]:
        """Σ_k w[l, k] of what was selected."""
        if self.kind == "sum":
            return pure.sum(1, keepdim=True)
        if self.kind == "each":
            return pure
        return _mixed(self._matrix(pure), pure)

    def spread(self, second: Float[Tensor, "n l ..."]) -> Float[Tensor, "n _ ..."]:
        """The transpose of `combine`, up to broadcasting over directions."""
        return second if self.kind != "mixed" else _mixed(self._matrix(second).T, second)

    def _matrix(self, like: Tensor) -> Float[Tensor, "l u"]:
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device)


def _mixed(matrix: Float[Tensor, "a b"], streams: Float[Tensor, "n b ..."]) -> Float[Tensor, "n a ..."]:
    """Sums along the second dimension. As a matrix product: einsum has no rule for batched backward passes."""
    flat = streams.reshape(*streams.shape[:2], -1)
    return (matrix @ flat).reshape(streams.shape[0], matrix.shape[0], *streams.shape[2:])
