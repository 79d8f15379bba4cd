"""α and μ: how far to go, and how much of the last step to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.steps.adaptive_spring import AdaptiveSPRING
from natgrad.steps.grafted import Grafted
from natgrad.steps.grid import GridSearch
from natgrad.steps.problem import LeastSquares
from natgrad.steps.quadratic import QuadraticModel
from natgrad.steps.search import CurvedSearch
from natgrad.steps.spring import SPRING
from natgrad.steps.trust import TrustRegion

# α below this is never held back: F̂ would have to be wrong by a factor of ten for it to be too large.
HARMLESS = 0.1


@dataclass(frozen=True)
class FixedStep:
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

    def scale(self, lr: float, length: float) -> float:
        """What the direction is multiplied by so that ½ lr² Δᵀ F̂ Δ ≤ κ.

        Args:
            lr: the group's present learning rate.
            length: an upper bound of Δᵀ F̂ Δ, such as −∇hᵀΔ = Δᵀ(F̂ + λI)Δ, which costs nothing.
        """
        if self.kl_clip is None or length <= 0:
            return 1.0
        divergence = 0.5 * lr**2 * length
        return min(1.0, math.sqrt(self.kl_clip / divergence)) if divergence > 0 else 1.0


@dataclass(frozen=True)
class AdaptiveStep:
    """α and μ minimise the quadratic model with the exact Fisher information (Martens & Grosse 2015, §6.4 and §7).

    Four things differ from that paper, each because a batch holds far fewer examples than a network has parameters:

    - Δ is made from an average of recent gradients, while the model's slope is the present batch's. An example that
      has just shaped Δ would otherwise both overstate the slope and, through its own outputs, the curvature along Δ.
    - In the first steps every layer has an α of its own, from the same model: the block-diagonal F̂ does not know how
      layers act together, and a coarse space of one direction a layer corrects that (two-level preconditioning; for
      K-FAC see Tselepidis, Kohler & Orvieto 2020, arXiv 2011.00573). Later it would starve layers whose progress is
      slow but lasting, so it ends.
    - A batch's minimiser fits the batch's noise too. What the next batch confirms of a step's slope is measured
      (`Confirmation`), and only that part of a step is taken; but no less than √(calm/t), the slowest decay that
      averages noise away (Robbins & Monro 1951), since what is best for one step is too short for many.
    - α may not outgrow its own running average at once: along a direction whose curvature a slice of the batch happens
      to miss, the model promises too much.

    Attributes:
        momentum: μ if it is to be fixed; None to adapt it.
        averaging: β, what a step leaves of the averaged gradient.
        settle: averaging begins after so many steps; before, the loss moves too fast for old gradients to count.
        coarse: for how many steps layers have their own α.
        groups: at most so many groups of layers then.
        fraction: the part of each batch on which F's products are taken.
        calm: from step `calm` on, the part of a step that is taken may fall as √(calm/t); None to take steps whole.
        growth: α is at most this multiple of its running average.
        average: γ of the average of iterates that `optimizer.averaged()` shows: iterate t counts about as tᵞ, and more
            where the next batch confirms nearly all of each step. None to keep none.
        steady: α is the geometric mean of its last measurements (`natgrad.steps.Pace`), and where these agree it is
            measured in every few steps only. For a fixed momentum: a free μ has to be measured with α.
        nesterov: Δ is made from βm + (1 − β)∇h with m the averaged gradient: the present batch counts 1 − β²
            of it instead of 1 − β (Dozat 2016, NAdam), so that steps overshoot less along directions of high
            curvature (Sutskever et al. 2013, §2.1).
    """

    momentum: float | None = None
    averaging: float = 0.9  # β
    settle: int = 10
    coarse: int = 15
    groups: int = 5
    fraction: float = 0.1
    calm: int | None = 40
    growth: float = 1.3
    average: float | None = 8.0
    steady: bool = False
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must lie in [0, 1), or be None to adapt it")
        if not 0 <= self.averaging < 1:
            raise ConfigError(f"averaging={self.averaging} must lie in [0, 1)")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction={self.fraction} must lie in (0, 1]")
        if not self.growth >= 1:
            raise ConfigError(f"growth={self.growth} must be at least 1")
        if self.calm is not None and self.calm < 1:
            raise ConfigError(f"calm={self.calm} must be at least 1 step, or None")
        if self.groups < 1:
            raise ConfigError(f"groups={self.groups} must be at least 1")
        if self.average is not None and not self.average >= 0:
            raise ConfigError(f"average={self.average} must be at least 0, or None to keep none")
        if self.steady and self.momentum is None:
            raise ConfigError(
                "steady=True needs a fixed momentum=, such as 0: a free one is measured with each step's α"
            )

    @classmethod
    def tempered(cls, momentum: float | None = None) -> AdaptiveStep:
        """Steps for a metric whose Δ is tempered: all from one steady α, averaged from the start, and soon relaxed.

        Such a Δ is right layer by layer to a power only, so that a coarse space over layers would mislead; and it is
        for batches so noisy that the model would use μ to undo the averaging of gradients.
        """
        return cls(momentum or 0.0, settle=0, coarse=0, calm=5, steady=True, nesterov=True)

    def keep(self, step: int) -> float:
        """β in this step: 0 until the loss has settled, then an equal-weighted mean that becomes an exponential one."""
        return 0.0 if step < self.settle else min(self.averaging, 1.0 - 1.0 / (step - self.settle + 1))

    def relaxation(self, step: int, confirmed: float) -> float:
        """The part of the model's minimiser that is taken: 1 without noise.

        Args:
            step: the present step, from 0.
            confirmed: the part of a step's slope that the next batch confirms.
        """
        if self.calm is None or step < self.coarse:
            return 1.0
        return min(1.0, max(confirmed, math.sqrt(self.calm / (step + 1))))

    def coefficients(
        self, model: QuadraticModel, previous: int | None, usual: float | None, unit: float = 1.0
    ) -> Float[Tensor, "K"]:
        """c for the model's directions.

        Args:
            model: the quadratic model; its first direction is Δ, or a part of it.
            previous: the index of the last step among them, if there was one.
            usual: the running average of α, where it is to be bounded.
            unit: what one nat per example is on the scale of the loss.
        """
        fixed = {} if previous is None or self.momentum is None else {previous: self.momentum}
        c = model.minimise(fixed)
        if (
            previous is not None and abs(float(c[previous])) > 1.0
        ):  # a tiny last step says little about far away
            fixed = {previous: math.copysign(1.0, float(c[previous]))}
            c = model.minimise(fixed)
        if usual is not None and float(c[0]) > (most := self.growth * max(usual, HARMLESS)):
            c = model.minimise(fixed | {0: most})
        return c * believable(model, c, unit)


def believable(model: QuadraticModel, c: Float[Tensor, "K"], unit: float = 1.0) -> float:
    """What the step c is multiplied by so that it does not promise more than the whole loss.

    A loss does not fall below zero, or that of a density by much more than a nat; a model that says so has left the
    range where it holds, as where a saturated output has next to no Fisher information, or a rate grows exponentially.
    """
    limit = max(abs(model.loss), unit)
    if not -model.change(c) > limit:  # also where the loss is not known
        return 1.0
    slope, curvature = float(model.linear @ c), float(c @ model.curvature @ c)
    # The smaller root of s·slope + ½ s²·curvature = −limit.
    return 2 * limit / (-slope + math.sqrt(max(0.0, slope**2 - 2 * curvature * limit)))


# What decides α, and the momentum coefficient μ with it.
StepSize: TypeAlias = FixedStep | AdaptiveStep | Grafted | TrustRegion


def step_size_from(lr: object, momentum: float | None, tempered: bool = False) -> StepSize:
    """A strategy from what the user gave as `lr` and `momentum`, for a metric that is `tempered` or not."""
    if isinstance(lr, StepSize):
        if momentum is not None:
            raise ConfigError("give momentum to the step size object, not beside it")
        return lr
    if lr is None:
        return AdaptiveStep.tempered(momentum) if tempered else AdaptiveStep(momentum)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise ConfigError(f"lr must be a number, None, or a natgrad step size, not {lr!r}")
    return FixedStep(float(lr), momentum or 0.0)


# What decides a step on residuals.
ResidualStep: TypeAlias = SPRING | GridSearch | AdaptiveSPRING | CurvedSearch


def residual_step_from(lr: object, momentum: float | None) -> ResidualStep | None:
    """A strategy for residuals from what the user gave as `lr` and `momentum`; None leaves it to the problem."""
    if isinstance(lr, ResidualStep):
        if momentum is not None:
            raise ConfigError("give momentum to the step size object, not beside it")
        return lr
    if lr is None:
        return None if momentum is None else AdaptiveSPRING(momentum)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise ConfigError(
            "lr must be a number, None, or natgrad.SPRING, GridSearch, AdaptiveSPRING or CurvedSearch where residuals "
            f"are fitted, not {lr!r}"
        )
    return SPRING(float(lr), momentum or 0.0)


def step_for(problem: LeastSquares) -> AdaptiveSPRING | CurvedSearch:
    """The strategy for a problem whose user named none: down to rounding where singular values are known."""
    return CurvedSearch() if problem.sharp else AdaptiveSPRING()
