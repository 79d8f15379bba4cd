"""The quadratic model, and the strategies that choose λ, α and μ."""

from natgrad.steps.adaptive_spring import AdaptiveSPRING
from natgrad.steps.alarm import Alarm
from natgrad.steps.confirmation import Confirmation, Promise
from natgrad.steps.damping import (
    ConstantDamping,
    Damping,
    LevenbergMarquardt,
    NoiseFloor,
    RelativeDamping,
    damping_from,
)
from natgrad.steps.grafted import Grafted
from natgrad.steps.grid import GridSearch
from natgrad.steps.pace import Pace
from natgrad.steps.penalty import L2
from natgrad.steps.problem import Decision, LeastSquares, half_square, predicted_change
from natgrad.steps.quadratic import QuadraticModel
from natgrad.steps.search import CurvedSearch
from natgrad.steps.size import (
    AdaptiveStep,
    FixedStep,
    ResidualStep,
    StepSize,
    believable,
    residual_step_from,
    step_for,
    step_size_from,
)
from natgrad.steps.spring import SPRING
from natgrad.steps.trust import Trial, TrustRegion
from natgrad.steps.witness import Witness

__all__ = [
    "L2",
    "SPRING",
    "AdaptiveSPRING",
    "AdaptiveStep",
    "Alarm",
    "Confirmation",
    "ConstantDamping",
    "CurvedSearch",
    "Damping",
    "Decision",
    "FixedStep",
    "Grafted",
    "GridSearch",
    "LeastSquares",
    "LevenbergMarquardt",
    "NoiseFloor",
    "Pace",
    "Promise",
    "QuadraticModel",
    "RelativeDamping",
    "ResidualStep",
    "StepSize",
    "Trial",
    "TrustRegion",
    "Witness",
    "believable",
    "damping_from",
    "half_square",
    "predicted_change",
    "residual_step_from",
    "step_for",
    "step_size_from",
]
