"""The block-diagonal operator: parameters of different blocks are independent of one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.linalg.stochastic import Estimated
from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import check_room
from natgrad.operators.hooks import Rows
from natgrad.operators.saving import describe_parts, rebuild_parts
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

    def _each(self, rows: Rows, of: Callable[[LinearOperator, Rows], Rows]) -> Rows:
        """What each block makes of its part of the vectors."""
        parts: Rows = {}
        for block in self.blocks:
            parts.update(of(block, {name: rows[name] for name in block.space.names}))
        return parts

    def _matmul(self, rows: Rows) -> Rows:
        return self._each(rows, lambda block, part: block._matmul(part))

    def _solve(self, rows: Rows, damping: float) -> Rows:
        return self._each(rows, lambda block, part: block._solve(part, damping))

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        return self._each(rows, lambda block, part: block._pinv_solve(part, rtol))

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        return self._each(rows, lambda block, part: block._sqrt_matmul(part, damping))

    def _dense(self) -> Tensor:
        check_room(self.space, self.dtype)
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

    def _trace(self) -> Tensor:
        return torch.stack([block._trace() for block in self.blocks]).sum()

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

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        space, parts = self.space.restrict(names), []
        for block in self.blocks:
            if own := [name for name in names if name in block.space.shapes]:
                parts.append(block.restrict(own))
        return parts[0] if parts[0].space == space else BlockDiagonal(space, parts)

    def _trace_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        return _independent([block._trace_estimate(probes, generator) for block in self.blocks])

    def _logdet_estimate(self, damping: float, probes: int, generator: torch.Generator | None) -> Estimated:
        return _independent([block._logdet_estimate(damping, probes, generator) for block in self.blocks])

    def _diagonal_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        parts = [block._diagonal_estimate(probes, generator) for block in self.blocks]
        both = []
        for flats in zip(*parts, strict=True):  # all values, then all standard errors
            named: dict[str, Tensor] = {}
            for block, flat in zip(self.blocks, flats, strict=True):
                named.update(block.space.unflatten(flat))
            both.append(self.space.flatten(named))
        return Estimated(*both)

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return BlockDiagonal(self.space, [block._to(dtype, device) for block in self.blocks])

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, parts = describe_parts(self.blocks)
        return tensors, {"parts": parts}

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> BlockDiagonal:
        return cls(space, rebuild_parts(tensors, meta["parts"]))


def _independent(parts: list[Estimated]) -> Estimated:
    """The sum of independent estimates."""
    value = torch.stack([part.value for part in parts]).sum()
    return Estimated(value, torch.stack([part.standard_error for part in parts]).norm())
