"""The block-diagonal operator: parameters of different blocks are independent of one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.operators.base import LinearOperator, Rows
from natgrad.operators.space import ParameterSpace


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(LinearOperator):
    """Operators on disjoint subspaces that together make the space.

    Attributes:
        space: the whole space, in any order of parameters.
        blocks: one operator for each subspace.

    Raises:
        ConfigError: the blocks overlap, leave a parameter out, know it in another shape, or differ in dtype or device.
    """

    space: ParameterSpace
    blocks: Sequence[LinearOperator]

    def __post_init__(self) -> None:
        entries = [entry for block in self.blocks for entry in block.space.entries]
        if sorted(entries) != sorted(self.space.entries):
            names = [name for name, _ in entries]
            twice = sorted({name for name in names if names.count(name) > 1})
            wrong = twice or sorted(name for name, _ in set(entries) ^ set(self.space.entries))
            raise ConfigError(
                f"each parameter must be in exactly one block, in its shape; see {', '.join(dict.fromkeys(wrong))}"
            )
        if len({(block.dtype, block.device) for block in self.blocks}) > 1:
            raise ConfigError("the blocks differ in dtype or device; convert them to one")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the blocks."""
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the blocks."""
        return self.blocks[0].device

    def _matmul(self, rows: Rows) -> Rows:
        parts: Rows = {}
        for block in self.blocks:
            parts.update(block._matmul({name: rows[name] for name in block.space.names}))
        return parts

    def _solve(self, rows: Rows, damping: float) -> Rows:
        parts: Rows = {}
        for block in self.blocks:
            parts.update(block._solve({name: rows[name] for name in block.space.names}, damping))
        return parts

    def _dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        places = torch.arange(self.space.numel, device=self.device)
        for block in self.blocks:
            place = torch.cat([places[self.space.slices[name]] for name in block.space.names])
            dense[place[:, None], place] = block._dense()
        return dense

    def _diagonal(self) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for block in self.blocks:
            parts.update(block._diagonal())
        return parts

    def _logdet(self, damping: float) -> Tensor:
        return torch.stack([block._logdet(damping) for block in self.blocks]).sum()

    def _eigenvalues(self, k: int) -> Tensor:
        return torch.cat([block._eigenvalues(min(k, block.space.numel)) for block in self.blocks])

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        parts: Rows = {}
        for block in self.blocks:
            parts.update(block._sample(n, damping, generator))
        return parts

    def _scaled(self, scale: float) -> LinearOperator:
        return BlockDiagonal(self.space, [block._scaled(scale) for block in self.blocks])
