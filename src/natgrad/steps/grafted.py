"""Another optimiser's step sizes on the natural gradient's directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.errors import ConfigError

DONORS = ("adam",)


@dataclass(frozen=True)
class Grafted:
    """Each layer goes as far as the donor would, in the direction of the natural gradient.

    A learning rate and a schedule that were found for AdamW then carry over as they are, as does its weight decay
    (`weight_decay`). Δ is made from the donor's averaged gradient. Parameters that no metric covers take the donor's
    own step. λ is relative by default (`RelativeDamping`), so that, as with Adam, a factor of the loss changes nothing.
    Agarwal et al. 2020, "Disentangling adaptive gradient methods from learning rates" (arXiv 2002.11803),
    §2; here by layers.

    Attributes:
        donor: whose step sizes: "adam".
        lr: the donor's learning rate; schedulers of `torch.optim.lr_scheduler` change it in the groups.
        betas: β₁ of the averaged gradient and β₂ of its squares (Kingma & Ba 2015, arXiv 1412.6980).
        eps: ε beside √v̂.

    Raises:
        ConfigError: a number is out of range, or the donor is not known.
    """

    donor: str = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.donor not in DONORS:
            raise ConfigError(f"unknown donor {self.donor!r}; choose one of {', '.join(map(repr, DONORS))}")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ConfigError(f"lr must be finite and at least 0; got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas} must lie in [0, 1)")
        if not self.eps > 0:
            raise ConfigError(f"eps={self.eps} must be positive")
