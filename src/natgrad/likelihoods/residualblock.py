"""Rows of a least-squares problem that belong together."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

WORKING = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclasses.dataclass(frozen=True, eq=False)
class ResidualBlock:
    """Residuals that belong together: those at the interior's points, say.

    Attributes:
        name: the user's name of them; "residuals" where there is one block without a name.
        values: √(w/N) r, real, with its graph.
        target: r column by column, as the Jacobian's rows are ordered; half the sum of its squares is the block's part
            of the loss.
        removed: orthonormal columns U where the Jacobian is (I − UUᵀ) times that of the values.
        loss: the block's part of the loss where that is something else.
    """

    name: str
    values: Float[Tensor, "N C"]
    target: Float[Tensor, "CN"]
    removed: Float[Tensor, "CN k"] | None = None
    loss: float | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    @classmethod
    def of(cls, name: str, values: Float[Tensor, "N C"]) -> ResidualBlock:
        """A block of residuals, which are their own target."""
        return cls(name, values, by_column(values.detach()))


def by_column(values: Float[Tensor, "N C"]) -> Float[Tensor, "CN"]:
    """The numbers of a block in the order of the Jacobian's rows."""
    return values.mT.reshape(-1)
