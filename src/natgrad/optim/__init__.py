"""The one optimiser."""

from natgrad.optim.coverage import Coverage, CoverageRow
from natgrad.optim.info import StepInfo
from natgrad.optim.natural import NaturalGradient
from natgrad.optim.policy import Policy, policy
from natgrad.optim.reconfigure import reconfigure

__all__ = ["Coverage", "CoverageRow", "NaturalGradient", "Policy", "StepInfo", "policy", "reconfigure"]
