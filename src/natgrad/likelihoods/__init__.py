"""p(y given the model's output z), and the Fisher information in z."""

from natgrad.likelihoods.base import Likelihood, Outputs, Targets
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.crossentropy import CrossEntropyLoss
from natgrad.likelihoods.diagonal import DiagonalLikelihood
from natgrad.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian
from natgrad.likelihoods.losses import likelihood_from
from natgrad.likelihoods.poisson import Poisson
from natgrad.likelihoods.residualblock import ResidualBlock
from natgrad.likelihoods.residuals import Residuals
from natgrad.likelihoods.scores import Scores

__all__ = [
    "Bernoulli",
    "Categorical",
    "CrossEntropyLoss",
    "DiagonalLikelihood",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Outputs",
    "Poisson",
    "ResidualBlock",
    "Residuals",
    "Scores",
    "Targets",
    "likelihood_from",
]
