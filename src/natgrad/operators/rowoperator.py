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
from natgrad.operators.checks import check_scalar, standard_normal
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
        self, targets: Float[Tensor, "M"], damping: float, order: float = 1.0
    ) -> dict[str, Tensor]:
        """(JᵀJ + λI)⁻¹ Jᵀ r = Jᵀ (JJᵀ + λI)⁻¹ r: the δ that minimises ‖Jδ − r‖² + λ‖δ‖².

        Without damping it is the one of least norm, J⁺ r. With an order q other than 1 a singular value S counts as

            1/S · 1 / (1 + (λ/S²)^q),

        which is 1/S above √λ and nothing below, the more sharply the larger q is; damping is q = 1.

        Args:
            targets: r, a number for each row.
            damping: λ ≥ 0.
            order: q ≥ 1; infinity cuts at √λ.

        Raises:
            ConfigError: λ is negative or not finite, q less than 1, or r has another length.
            NotPositiveDefiniteError: JJᵀ is not positive semi-definite, by more than rounding explains.
        """
        check_scalar("damping", damping)
        if not order >= 1:
            raise ConfigError(f"order is {order}; it must be at least 1")
        if targets.shape != (len(self.rows),):
            raise ConfigError(
                f"r must have a number for each of {len(self.rows)} rows, not {tuple(targets.shape)}"
            )
        return {name: v[0] for name, v in self._dual_solve(targets[None], damping, float(order)).items()}

    def dual_step(
        self, targets: Float[Tensor, "M"], damping: float
    ) -> tuple[dict[str, Tensor], Float[Tensor, "M"] | None]:
        """δ of `dual_solve`, as well as a step needs it, and Jδ where it is known without another product.

        Args:
            targets: r, a number for each row.
            damping: λ ≥ 0.
        """
        return self.dual_solve(targets, damping), None

    @abc.abstractmethod
    def _dual_solve(self, targets: Float[Tensor, "K M"], damping: float, order: float) -> Rows:
        """Jᵀ (JJᵀ + λI)⁺ r for K right-hand sides, or its like of another order."""

    @property
    def condition(self) -> float | None:
        """The largest singular value of J over the least that is not rounding, or None."""
        return None

    def effective_rank(self, damping: float) -> int | None:
        """How many singular values of J are above √λ, and above rounding; None if not known."""
        return None

    @final
    def _perturbed(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        """n draws Jᵀε + √λ ε', whose covariance is JᵀJ + λI, so that their solutions have its inverse for covariance.

        Papandreou & Yuille 2010, "Gaussian sampling by local perturbations".
        """
        noise = standard_normal(n, (len(self.rows),), self.dtype, self.device, generator)
        rows = self.rows.rmatmul(noise)
        for name, v in rows.items():
            more = standard_normal(n, tuple(v.shape[1:]), self.dtype, self.device, generator)
            rows[name] = v.add_(more, alpha=damping**0.5)
        return rows

    @final
    @staticmethod
    def _filter(squares: Tensor, damping: float, order: float) -> Tensor:
        """1/(S² + λ), or its like of another order, of squared singular values; 0 where these are rounding's."""
        least = len(squares) * torch.finfo(squares.dtype).eps ** 2 * squares.max()
        if order == 1:
            weights = 1 / (squares + damping)
        else:
            ratio = damping / squares.clamp_min(torch.finfo(squares.dtype).tiny)
            weights = 1 / (squares * (1 + ratio**order))
        return torch.where(squares > least, weights, 0.0)

    def _matmul(self, rows: Rows) -> Rows:
        return self.rows.product(rows)

    def _diagonal(self) -> dict[str, Tensor]:
        return self.rows.squares()

    def _restricted(self, names: tuple[str, ...]) -> RowOperator:
        return dataclasses.replace(self, rows=self.rows.restrict(names))

    def _to(self, dtype: torch.dtype, device: torch.device) -> RowOperator:
        return dataclasses.replace(self, rows=self.rows.to(dtype, device))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = self.rows.state()
        options = [f.name for f in dataclasses.fields(self) if f.init and f.name != "rows"]
        return tensors, meta | {"options": {name: getattr(self, name) for name in options}}

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> RowOperator:
        return cls(FactoredRows.from_state(space, tensors, meta), **meta.get("options", {}))
