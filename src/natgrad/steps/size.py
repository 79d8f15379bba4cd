"""α and μ: how far to go, and how much of the last step to keep."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.steps.quadratic import QuadraticModel


@dataclass(frozen=True)
class StepSize(abc.ABC):
    """Decides α, and the momentum coefficient μ with it."""


@dataclass(frozen=True)
class FixedStep(StepSize):
    """θ ← θ + lr · v with v ← μ v + Δ: the velocity form, as in torch.optim.SGD.

    Attributes:
        lr: α.
        momentum: μ.
        kl_clip: an upper bound κ on the quadratic prediction of the KL divergence, ½ lr² Δᵀ F̂ Δ ≤ κ (nats per
            example): a direction that would go further is shortened. Osawa et al. 2019 (arXiv 1811.12019), §IV-B.
            None for no bound. It does not apply to the Euclidean metric, whose norm is no divergence.
    """

    lr: float
    momentum: float = 0.0
    kl_clip: float | None = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ConfigError(f"lr must be finite and at least 0; got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must lie in [0, 1)")
        if self.kl_clip is not None and not self.kl_clip > 0:
            raise ConfigError(f"kl_clip={self.kl_clip} must be positive, or None for no bound")

    def scale(self, lr: float, decrease: float) -> float:
        """What the direction is multiplied by so that ½ lr² Δᵀ F̂ Δ ≤ κ.

        Args:
            lr: the group's present learning rate.
            decrease: −∇hᵀΔ = Δᵀ(F̂ + λI)Δ, an upper bound of Δᵀ F̂ Δ that costs nothing.
        """
        if self.kl_clip is None or decrease <= 0:
            return 1.0
        divergence = 0.5 * lr**2 * decrease
        return min(1.0, math.sqrt(self.kl_clip / divergence)) if divergence > 0 else 1.0


@dataclass(frozen=True)
class AdaptiveStep(StepSize):
    """α and μ minimise the quadratic model with the exact Fisher information (Martens & Grosse 2015, §6.4 and §7).

    In the first steps every layer gets an α of its own, from the same model: the block-diagonal F̂ does not know how
    layers act together, and a coarse space of one direction a layer corrects that (two-level preconditioning; for
    K-FAC see Tselepidis, Kohler & Orvieto 2020, arXiv 2011.00573). Later it would starve layers whose progress is
    slow but lasting, so it ends.

    Attributes:
        momentum: μ if it is to be fixed; None to adapt it.
        fraction: the part of each batch on which F's products are taken.
        coarse: for how many steps layers have their own α.
        groups: at most so many groups of layers then.
    """

    momentum: float | None = None
    fraction: float = 0.25
    coarse: int = 25
    groups: int = 8

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must lie in [0, 1), or be None to adapt it")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction={self.fraction} must lie in (0, 1]")

    def coefficients(self, model: QuadraticModel, previous: int | None) -> Float[Tensor, "K"]:
        """c for the model's directions; `previous` is the index of the last step among them, if there was one."""
        fixed = {} if previous is None or self.momentum is None else {previous: self.momentum}
        return model.minimise(fixed)


def step_size_from(lr: float | StepSize | None, momentum: float | None) -> StepSize:
    """A strategy from what the user gave as `lr` and `momentum`."""
    if isinstance(lr, StepSize):
        if momentum is not None:
            raise ConfigError("give momentum to the step size object, not beside it")
        return lr
    if lr is None:
        return AdaptiveStep(momentum)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise ConfigError(f"lr must be a number, None, or a natgrad step size, not {lr!r}")
    return FixedStep(float(lr), momentum or 0.0)
