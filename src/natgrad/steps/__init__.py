"""The quadratic model, and the strategies that choose λ, α and μ."""

from natgrad.steps.alarm import Alarm
from natgrad.steps.confirmation import Confirmation, Promise
from natgrad.steps.damping import ConstantDamping, Damping, LevenbergMarquardt, damping_from
from natgrad.steps.penalty import L2
from natgrad.steps.quadratic import QuadraticModel
from natgrad.steps.size import AdaptiveStep, FixedStep, StepSize, step_size_from
from natgrad.steps.witness import Witness

__all__ = [
    "L2",
    "AdaptiveStep",
    "Alarm",
    "Confirmation",
    "ConstantDamping",
    "Damping",
    "FixedStep",
    "LevenbergMarquardt",
    "Promise",
    "QuadraticModel",
    "StepSize",
    "Witness",
    "damping_from",
    "step_size_from",
]
