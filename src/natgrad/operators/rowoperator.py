"""What operators that are made of rows, F = JᵀJ, have in common, and what they alone can do."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.operators.base import LinearOperator
from natgrad.operators.checks import check_scalar
from natgrad.operators.hooks import Rows
from natgrad.operators.rows import FactoredRows
from natgrad.operators.space import ParameterSpace


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RowOperator(LinearOperator):
    """F = JᵀJ by its M rows J.

    Besides F it knows J, and so solves least-squares problems in the order that loses the fewest digits.

    Attributes:
        rows: J.
    """

    rows: FactoredRows

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", self.rows.space)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.rows.device

    @final
    @torch.no_grad()
    def dual_solve(
        self, targets: Float[Tensor, "M"], damping: float, cutoff: float = 0.0
    ) -> dict[str, Tensor]:
        """(JᵀJ + λI)⁻¹ Jᵀ r = Jᵀ (JJᵀ + λI)⁻¹ r: the δ that minimises ‖Jδ − r‖² + λ‖δ‖².

        Without damping it is the one of least norm, J⁺ r.

        Args:
            targets: r, a number for each row.
            damping: λ ≥ 0.
            cutoff: singular values of J up to so many times the largest count as zero. What can't be told from
                rounding does so anyway.

        Raises:
            ConfigError: λ or the cutoff is negative or not finite, or r has another length.
            NotPositiveDefiniteError: JJᵀ is not positive semi-definite, by more than rounding explains.
        """
        check_scalar("damping", damping)
        check_scalar("cutoff", cutoff)
        if targets.shape != (len(self.rows),):
            raise ConfigError(
                f"r must have a number for each of {len(self.rows)} rows, not {tuple(targets.shape)}"
            )
        return {name: v[0] for name, v in self._dual_solve(targets[None], damping, cutoff).items()}

    @abc.abstractmethod
    def _dual_solve(self, targets: Float[Tensor, "K M"], damping: float, cutoff: float) -> Rows:
        """Jᵀ (JJᵀ + λI)⁺ r for K right-hand sides."""

    @property
    @abc.abstractmethod
    def condition(self) -> float:
        """The largest singular value of J over the least that is not rounding, exactly or roughly."""

    def _matmul(self, rows: Rows) -> Rows:
        return self.rows.product(rows)

    def _diagonal(self) -> dict[str, Tensor]:
        return self.rows.squares()

    def _restricted(self, names: tuple[str, ...]) -> RowOperator:
        return type(self)(self.rows.restrict(names))

    def _to(self, dtype: torch.dtype, device: torch.device) -> RowOperator:
        return type(self)(self.rows.to(dtype, device))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.rows.state()

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> RowOperator:
        return cls(FactoredRows.from_state(space, tensors, meta))
