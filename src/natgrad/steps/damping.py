"""λ: how far the quadratic model is trusted."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch

from natgrad.errors import ConfigError
from natgrad.steps.witness import Witness


@dataclass(frozen=True)
class Damping(abc.ABC):
    """Decides λ. The value itself is kept by the optimiser."""

    initial: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.initial) and self.initial >= 0):
            raise ConfigError(f"damping must be finite and at least 0; got {self.initial}")

    def trials(self) -> tuple[float, ...]:
        """Values of λ to try in the first step, in order, for as long as the loss after it gets much better."""
        return (self.initial,)

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether the reduction ratio ρ is wanted after this step (it costs a forward pass)."""

    def trial(self, damping: float, witness: Witness | None) -> float | None:
        """A smaller λ whose promise `update` wants to know (it costs a solve and a forward pass); None for none."""
        return None

    @abc.abstractmethod
    def update(
        self, damping: float, ratio: float, witness: Witness | None = None, elasticity: float | None = None
    ) -> float:
        """λ after a step.

        Args:
            damping: λ.
            ratio: ρ = [h(θ+δ) − h(θ)] / [M(δ) − M(0)].
            witness: averages of α and of λ's share in the curvature, where one number describes them.
            elasticity: e where the decrease that M promises, without λ, grows as λ⁻ᵉ; None where it is not known.
        """


@dataclass(frozen=True)
class Unmeasured(Damping):
    """A rule that no step's outcome changes."""

    def due(self, step: int) -> bool:
        """Never: ρ is not needed."""
        return False

    def update(
        self, damping: float, ratio: float, witness: Witness | None = None, elasticity: float | None = None
    ) -> float:
        """λ, unchanged."""
        return damping


@dataclass(frozen=True)
class ConstantDamping(Unmeasured):
    """λ stays as it is."""

    initial: float = 1e-3


@dataclass(frozen=True)
class RelativeDamping(Unmeasured):
    """λ of each layer is so many mean eigenvalues of its own block of F̂: without a unit, and the same for any loss.

    For metrics that damp layer by layer (`KFAC`, `EKFAC`, `Tempered`, `Diagonal`) with lr= or `Grafted`, whose default
    it is.

    Attributes:
        initial: how many.
    """

    initial: float = 1.0


@dataclass(frozen=True)
class LevenbergMarquardt(Damping):
    """The Levenberg–Marquardt rule, Martens & Grosse 2015, §6.5, with a second witness.

    ρ says whether the quadratic model can be trusted, but that model has the exact Fisher information: it stays true
    even where F̂ is wrong, because α then shrinks. α itself tells: it is Δᵀ(F̂+λI)Δ over Δᵀ(F+λI)Δ, the curvature that
    the metric expects along Δ over the true one. Where it is small, λ has let in directions that F̂ does not know, or
    layers do the same thing, as all that write into one residual stream do: F̂ is block-diagonal and counts them each
    alone, whatever λ. Only in the first case does a larger λ help. What a smaller one would promise tells them apart.

    Attributes:
        initial: λ at the start, in nats per parameter².
        decay: ω₁, what a step of good agreement leaves of λ.
        period: T₁, steps between two measurements of ρ.
        trust: (low, high): λ rises where α is below low, and falls only where it is above high.
        worth: where α is below low, λ falls if the promised decrease grows as λ⁻ᵉ with e above this, and rises if not.
        share: α no longer raises λ where λ is more than this part of the curvature along Δ. With few examples a batch
            α is small because the next batch's gradient is another, whatever λ.
        least: λ never falls below it.
        greatest: λ never rises above it.
    """

    initial: float = 1.0
    decay: float = 0.9  # ω₁
    period: int = 5  # T₁
    trust: tuple[float, float] = (0.2, 0.4)
    worth: float = 0.05
    share: float = 1 / 3
    least: float = 1e-8
    greatest: float = 1e6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay < 1:
            raise ConfigError(f"decay={self.decay} must lie in (0, 1)")
        if self.period < 1:
            raise ConfigError(f"period={self.period} must be at least 1 step")

    def trials(self) -> tuple[float, ...]:
        """The initial value, a tenth and a hundredth of it: λ's unit is the user's loss, so its scale is a guess."""
        return (self.initial, self.initial / 10, self.initial / 100)

    @property
    def factor(self) -> float:
        """What a measurement of good agreement leaves of λ."""
        return self.decay**self.period

    def due(self, step: int) -> bool:
        """Every `period` steps."""
        return step % self.period == 0

    def trial(self, damping: float, witness: Witness | None) -> float | None:
        """The next smaller λ, where α is small."""
        return damping * self.factor if witness is not None and witness.alpha < self.trust[0] else None

    def update(
        self, damping: float, ratio: float, witness: Witness | None = None, elasticity: float | None = None
    ) -> float:
        """λω where ρ > ¾ and α is large, or a smaller λ is worth it; λ/ω where ρ < ¼ or α is small, λ/ω² where the
        loss rose.
        """
        witness = witness or Witness(math.inf)
        low, high = self.trust
        if not math.isfinite(ratio) or ratio < 0:
            damping = damping / self.factor**2
        elif ratio < 0.25:
            damping = damping / self.factor
        elif witness.alpha < low and elasticity is not None and elasticity > self.worth:
            damping = damping * self.factor
        elif witness.alpha < low and witness.share <= self.share:
            damping = damping / self.factor
        elif ratio > 0.75 and witness.alpha > high:
            damping = damping * self.factor
        return min(max(damping, self.least), self.greatest)


@dataclass(frozen=True)
class NoiseFloor(Unmeasured):
    """λ at what rounding leaves of F's spectrum: the least that a solve through JJᵀ or JᵀJ bears.

    For steps on residuals. A system of M rows in a precision of ε has eigenvalues that are noise up to about M ε times
    its largest one.

    Attributes:
        initial: λ in that unit.
    """

    initial: float = 1.0

    def of(self, largest: float, rows: int, dtype: torch.dtype) -> float:
        """λ.

        Args:
            largest: F's largest eigenvalue.
            rows: M.
            dtype: of the solve.
        """
        return self.initial * rows * torch.finfo(dtype).eps * largest


def damping_from(
    damping: float | Damping | None, adaptive: bool, tempered: bool = False, relative: bool = False
) -> Damping:
    """A strategy from what the user gave; by default Levenberg–Marquardt where steps are adaptive, else constant.

    A tempered metric needs no λ but against rounding: its power already holds low curvature back. Where steps have
    another's length, and the metric allows it, λ is relative.
    """
    if isinstance(damping, Damping):
        return damping
    if damping is None and relative:
        return RelativeDamping()
    if damping is None and tempered:
        return ConstantDamping(1e-7)
    if damping is None:
        return LevenbergMarquardt() if adaptive else ConstantDamping()
    if not isinstance(damping, (int, float)):
        raise ConfigError(f"damping must be a number or a natgrad.Damping, not {damping!r}")
    return ConstantDamping(float(damping))
