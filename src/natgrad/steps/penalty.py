"""L2 regularisation as part of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.errors import ConfigError


@dataclass(frozen=True)
class L2:
    """½η‖θ‖² added to the loss: to its gradient, its value and its curvature (Martens & Grosse 2015, §6.1).

    Give it as `weight_decay=natgrad.L2(1e-5)`; a plain number is decay decoupled from the loss (Loshchilov & Hutter
    2019, arXiv 1711.05101).

    Attributes:
        strength: η, in nats per parameter².
    """

    strength: float

    def __post_init__(self) -> None:
        check_decay(self.strength)


def check_decay(value: float) -> None:
    """Raises ConfigError unless the value is finite and at least 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise ConfigError(
            f"weight decay must be a finite number of at least 0, or natgrad.L2(...); got {value!r}"
        )
