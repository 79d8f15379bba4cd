"""A principal submatrix that has no representation of its own: some parameters of an operator, the others held.

With w the parameters that stay and b those that don't, the blocks of the whole's inverse Σ = (A + λI)⁻¹ give
(A_ww + λI)⁻¹ = Σ_ww − Σ_wb Σ_bb⁻¹ Σ_bw (Schur complement). Where b is the smaller part, Σ_bb is all that is formed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import final

import torch
from torch import Tensor

from natgrad.errors import ConfigError, NotPositiveDefiniteError
from natgrad.linalg import cholesky
from natgrad.operators.base import LinearOperator
from natgrad.operators.blocks import BlockDiagonal
from natgrad.operators.checks import check_room
from natgrad.operators.dense import Dense
from natgrad.operators.hooks import Rows
from natgrad.operators.space import ParameterSpace
from natgrad.operators.wrapper import Wrapper

# The most numbers that columns of the whole take at once while the submatrix is formed.
COLUMNS = 2**24


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Restricted(Wrapper):
    """A_ww for an operator A and some of its parameters.

    Solutions, log-determinants and draws come from A's own where the parameters left out are the smaller part, and
    else from the dense submatrix; roots and eigenvalues always from that.

    Attributes:
        operator: A.
        names: the parameters that stay, in the order of this operator's space; not all of A's.

    Raises:
        VectorError: a name that is not in A's space.
        ConfigError: all names stay.
    """

    names: tuple[str, ...]
    _complements: dict[float, Tensor] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", self.operator.space.restrict(self.names))
        if len(self.space.names) == len(self.operator.space.names):
            raise ConfigError("nothing is left out; operator.restrict(names) gives the same in another order")

    @functools.cached_property
    def _held(self) -> ParameterSpace:
        whole = self.operator.space
        return whole.restrict(name for name in whole.names if name not in self.names)

    @functools.cached_property
    def _whole(self) -> Dense:
        return Dense(self.space, self._dense())

    def _padded(self, rows: Rows) -> Rows:
        """Vectors of the whole space, with zeros where there is nothing."""
        count = len(next(iter(rows.values())))
        return {
            name: rows[name]
            if name in rows
            else torch.zeros(count, *shape, dtype=self.dtype, device=self.device)
            for name, shape in self.operator.space.entries
        }

    def _complement(self, damping: float) -> Tensor | None:
        """Σ_bb's Cholesky factor; None where the dense submatrix is the way: it is smaller, or A singular."""
        if self._held.numel >= self.space.numel:
            return None
        if damping not in self._complements:
            try:
                # In closed form where the inverse has one for these parameters, as EKFAC's has for a bias.
                block = self.operator.inv(damping).restrict(self._held.names)._dense()
            except NotPositiveDefiniteError:
                if damping:
                    raise
                return None  # A_ww may still be regular
            lower, _ = cholesky(block, layer=self._held.label, factor="F⁻¹")
            self._complements.clear()
            self._complements[damping] = lower
        return self._complements[damping]

    def _conditioned(self, rows: Rows, complement: Tensor, damping: float) -> Rows:
        """x_w − Σ_wb Σ_bb⁻¹ x_b: what is left of a vector of the whole when its part b is taken to zero."""
        columns = torch.cholesky_solve(self._held.flatten_rows(rows).mT, complement)
        taken = self.operator._solve(self._padded(self._held.unflatten_rows(columns.mT)), damping)
        return {name: rows[name] - taken[name] for name in self.names}

    def _matmul(self, rows: Rows) -> Rows:
        product = self.operator._matmul(self._padded(rows))
        return {name: product[name] for name in self.names}

    def _solve(self, rows: Rows, damping: float) -> Rows:
        complement = self._complement(damping)
        if complement is None:
            return self._whole._solve(rows, damping)
        whole = self.operator._solve(self._padded(rows), damping)
        return self._conditioned(whole, complement, damping)

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        return self._whole._pinv_solve(rows, rtol)

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._whole._sqrt_matmul(rows, damping)

    def _dense(self) -> Tensor:
        check_room(self.space, self.dtype)
        size, step = self.space.numel, max(1, COLUMNS // self.operator.space.numel)
        dense = torch.empty(size, size, dtype=self.dtype, device=self.device)
        for start in range(0, size, step):
            stop = min(start + step, size)
            unit = torch.zeros(stop - start, size, dtype=self.dtype, device=self.device)
            unit[:, start:stop].fill_diagonal_(1)
            dense[start:stop] = self.space.flatten_rows(self._matmul(self.space.unflatten_rows(unit)))
        return (dense + dense.mT) / 2

    def _diagonal(self) -> dict[str, Tensor]:
        diagonal = self.operator._diagonal()
        return {name: diagonal[name] for name in self.names}

    def _logdet(self, damping: float) -> Tensor:
        complement = self._complement(damping)
        if complement is None:
            return self._whole._logdet(damping)
        return self.operator._logdet(damping) + 2 * complement.diagonal().log().sum()

    def _eigenvalues(self, k: int) -> Tensor:
        return self._whole._eigenvalues(k)

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        complement = self._complement(damping)
        if complement is None:
            return self._whole._sample(n, damping, generator)
        return self._conditioned(self.operator._sample(n, damping, generator), complement, damping)

    def _scaled(self, scale: float) -> LinearOperator:
        return Restricted(self.operator._scaled(scale), self.names)

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        return self.operator.restrict(names)


def restrict(operator: LinearOperator, names: tuple[str, ...]) -> LinearOperator:
    """A_ww where it has no representation of its own; of all parameters, A in another order."""
    if len(names) == len(operator.space.names):
        return BlockDiagonal(operator.space.restrict(names), [operator])
    return Restricted(operator, names)
