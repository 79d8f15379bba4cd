"""Natural gradient descent for PyTorch: θ ← θ − α (F(θ) + λI)⁻¹ ∇L(θ)."""

from natgrad.errors import (
    ConfigError,
    CoverageWarning,
    EmptyError,
    ModelChangedError,
    NatgradError,
    NonFiniteError,
    NotPositiveDefiniteError,
    OutputError,
    RunError,
    StateError,
    StepError,
    TargetError,
    UnknownNameError,
    UnsupportedLossError,
    VectorError,
)
from natgrad.likelihoods import (
    Bernoulli,
    Categorical,
    DiagonalLikelihood,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
)
from natgrad.metrics import KFAC, Dense, Diagonal, Euclidean, Metric
from natgrad.operators import LinearOperator, ParameterSpace
from natgrad.optim import Coverage, NaturalGradient, StepInfo
from natgrad.steps import L2, AdaptiveStep, ConstantDamping, Damping, FixedStep, LevenbergMarquardt

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "L2",
    "AdaptiveStep",
    "Bernoulli",
    "Categorical",
    "ConfigError",
    "ConstantDamping",
    "Coverage",
    "CoverageWarning",
    "Damping",
    "Dense",
    "Diagonal",
    "DiagonalLikelihood",
    "EmptyError",
    "Euclidean",
    "FixedStep",
    "Gaussian",
    "HeteroscedasticGaussian",
    "LevenbergMarquardt",
    "Likelihood",
    "LinearOperator",
    "Metric",
    "ModelChangedError",
    "NatgradError",
    "NaturalGradient",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "OutputError",
    "ParameterSpace",
    "Poisson",
    "RunError",
    "StateError",
    "StepError",
    "StepInfo",
    "TargetError",
    "UnknownNameError",
    "UnsupportedLossError",
    "VectorError",
]
