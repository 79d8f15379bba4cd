"""From a torch loss to the likelihood whose negative log it is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from natgrad.errors import UnsupportedLossError
from natgrad.likelihoods.base import Likelihood
from natgrad.likelihoods.bernoulli import Bernoulli
from natgrad.likelihoods.categorical import Categorical
from natgrad.likelihoods.crossentropy import CrossEntropyLoss
from natgrad.likelihoods.gaussian import Gaussian, HeteroscedasticGaussian
from natgrad.likelihoods.poisson import Poisson


def _with_z_loss(loss: CrossEntropyLoss) -> Categorical:
    return loss.likelihood()


def _categorical(loss: nn.CrossEntropyLoss) -> Categorical:
    return Categorical(
        weight=loss.weight,
        label_smoothing=loss.label_smoothing,
        ignore_index=loss.ignore_index,
        reduction=loss.reduction,
    )


def _bernoulli(loss: nn.BCEWithLogitsLoss) -> Bernoulli:
    return Bernoulli(weight=loss.weight, pos_weight=loss.pos_weight, reduction=loss.reduction)


def _gaussian(loss: nn.MSELoss) -> Gaussian:
    return Gaussian(reduction=loss.reduction)


def _heteroscedastic(loss: nn.GaussianNLLLoss) -> HeteroscedasticGaussian:
    return HeteroscedasticGaussian(eps=loss.eps, full=loss.full, reduction=loss.reduction)


def _poisson(loss: nn.PoissonNLLLoss) -> Poisson:
    if not loss.log_input:
        raise UnsupportedLossError(
            "PoissonNLLLoss(log_input=False) reads rates, in which the Fisher information is unbounded near 0; let "
            "the model return log-rates and pass PoissonNLLLoss(log_input=True)"
        )
    return Poisson(full=loss.full, reduction=loss.reduction)


_BUILDERS: dict[type[nn.Module], Callable[..., Likelihood]] = {
    CrossEntropyLoss: _with_z_loss,  # before torch's, of which it is a subclass
    nn.CrossEntropyLoss: _categorical,
    nn.BCEWithLogitsLoss: _bernoulli,
    nn.MSELoss: _gaussian,
    nn.GaussianNLLLoss: _heteroscedastic,
    nn.PoissonNLLLoss: _poisson,
}

_OWN = "a natgrad Likelihood of your own"

# What to pass instead, for the losses that people are most likely to come with.
_INSTEAD: dict[type[nn.Module], str] = {
    nn.NLLLoss: "CrossEntropyLoss on the logits, without the log-softmax",
    nn.BCELoss: "BCEWithLogitsLoss on the logits, without the sigmoid",
    nn.L1Loss: f"MSELoss, or {_OWN}",
    nn.SmoothL1Loss: f"MSELoss, or {_OWN}",
    nn.HuberLoss: f"MSELoss, or {_OWN}",
    nn.KLDivLoss: "CrossEntropyLoss on the logits with class probabilities as targets, which has the same gradient",
    nn.MultiLabelSoftMarginLoss: "BCEWithLogitsLoss, which is the same loss",
    nn.SoftMarginLoss: "BCEWithLogitsLoss with targets 0 and 1, which is the same loss",
}

_FUNCTIONS: dict[Callable[..., object], str] = {
    F.cross_entropy: "torch.nn.CrossEntropyLoss(...) with the same options",
    F.binary_cross_entropy_with_logits: "torch.nn.BCEWithLogitsLoss(...) with the same options",
    F.mse_loss: "torch.nn.MSELoss(...) with the same options",
    F.gaussian_nll_loss: "torch.nn.GaussianNLLLoss(...) with the same options",
    F.poisson_nll_loss: "torch.nn.PoissonNLLLoss(...) with the same options",
    F.nll_loss: _INSTEAD[nn.NLLLoss],
    F.binary_cross_entropy: _INSTEAD[nn.BCELoss],
    F.l1_loss: _INSTEAD[nn.L1Loss],
    F.smooth_l1_loss: _INSTEAD[nn.SmoothL1Loss],
    F.huber_loss: _INSTEAD[nn.HuberLoss],
    F.kl_div: _INSTEAD[nn.KLDivLoss],
}


def likelihood_from(loss: object) -> Likelihood:
    """The likelihood of a torch loss, with its weights (by reference) and its reduction.

    Args:
        loss: an `nn.CrossEntropyLoss`, `nn.BCEWithLogitsLoss`, `nn.MSELoss`, `nn.GaussianNLLLoss`,
            `nn.PoissonNLLLoss(log_input=True)`, `natgrad.CrossEntropyLoss` or a subclass of one that has the same
            `forward`; or a `Likelihood`, which is returned as it is.

    Returns:
        The likelihood, for which `likelihood.loss(z, y) == loss(z, y)`.

    Raises:
        UnsupportedLossError: any other loss, `reduction="none"`, or a `forward` of one's own: its Fisher would be
            another loss's.
    """
    if isinstance(loss, Likelihood):
        return loss
    for family, build in _BUILDERS.items():
        if isinstance(loss, family):
            _check_own_forward(loss, family)
            _check_scalar(loss)
            return build(loss)
    raise UnsupportedLossError(_advice(loss))


def _check_own_forward(loss: nn.Module, family: type[nn.Module]) -> None:
    kind = type(loss)
    if kind.forward is not family.forward or kind.__call__ is not family.__call__ or "forward" in vars(loss):
        raise UnsupportedLossError(
            f"{kind.__name__} has a forward of its own, so its Fisher information is not {family.__name__}'s; pass "
            f"{family.__name__} if that is the loss, or {_OWN}"
        )


def _check_scalar(loss: nn.Module) -> None:
    if loss.reduction not in ("mean", "sum"):
        raise UnsupportedLossError(
            f"{type(loss).__name__} has reduction={loss.reduction!r}, but the Fisher is that of a scalar loss; pass "
            "reduction='mean' or 'sum'"
        )


def _advice(loss: object) -> str:
    names = [f"torch.nn.{family.__name__}" for family in _BUILDERS if family is not CrossEntropyLoss]
    supported = f"supported: {', '.join(names)}, or {_OWN}"
    if isinstance(loss, type) and issubclass(loss, (nn.Module, Likelihood)):
        return f"{loss.__name__} is a class; pass an instance, {loss.__name__}()"
    if isinstance(loss, nn.Module):
        name = type(loss).__name__
        instead = next((advice for kind, advice in _INSTEAD.items() if isinstance(loss, kind)), None)
    else:
        function = loss.func if isinstance(loss, functools.partial) else loss
        name = getattr(function, "__name__", None) or repr(loss)
        instead = _FUNCTIONS.get(function) if callable(function) else None
        if callable(function):
            name = f"the function {name}"
            instead = (
                instead or "a torch.nn loss module: a function does not say which distribution it belongs to"
            )
    return f"{name} has no known likelihood; " + (f"pass {instead}; " if instead else "") + supported
