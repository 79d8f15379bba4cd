"""Real targets with Gaussian noise: `torch.nn.MSELoss` and `torch.nn.GaussianNLLLoss`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.errors import ConfigError, OutputError, TargetError
from natgrad.likelihoods.base import Outputs, Targets, like, working_dtype
from natgrad.likelihoods.checks import check_reduction, check_same_shape, check_tensor, value_range
from natgrad.likelihoods.diagonal import DiagonalLikelihood


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Gaussian(DiagonalLikelihood):
    """y ~ N(z, 1), an event for each element of the outputs.

    The squared error is twice a Gaussian nll: h = c Σ ½(z − y)² with c = 2/count ("mean") or 2 ("sum"), and H = c I,
    the Hessian in z.

    Attributes:
        reduction: "mean" over all elements, or "sum".

    Raises:
        ConfigError: a reduction other than these.
    """

    _nlls = 2.0

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def _loss(self, z: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(z, like(targets, z), reduction=self.reduction)

    def _log_prob(self, z: Tensor, targets: Tensor) -> Tensor:
        return -0.5 * ((z - like(targets, z)).square() + math.log(2 * math.pi))

    def _sample(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return _noise(z, generator).add_(z).to(z.dtype)

    @property
    def _weighted_by_targets(self) -> bool:
        return False

    def _check_outputs(self, outputs: Any) -> None:
        check_tensor("Gaussian", outputs, "one tensor of means")

    def _check_targets(self, outputs: Tensor, targets: Any, values: bool) -> None:
        check_same_shape("Gaussian", outputs, targets)

    def _information(self, z: Tensor, targets: Tensor | None) -> Tensor:
        information = torch.full((), 2 * self._constant(z.numel()), dtype=working_dtype(z), device=z.device)
        return information.expand(z.shape)

    def _divergence(self, z: Tensor, other: Tensor, targets: Tensor | None) -> Tensor:
        return (z - other).square() * self._constant(z.numel())

    def _sampled_signal(self, z: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return _noise(z, generator).mul_(-math.sqrt(2 * self._constant(z.numel()))).to(z.dtype)

    def _empirical_signal(self, z: Tensor, targets: Tensor) -> Tensor:
        residual = z.to(working_dtype(z)) - like(targets, z)
        return residual.mul_(math.sqrt(2 * self._constant(z.numel()))).to(z.dtype)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HeteroscedasticGaussian(DiagonalLikelihood):
    """y ~ N(m, v), an event for each element of the mean m.

    h = c Σ ½[log v + (m − y)²/v], and H is diagonal: c/v for m, c/(2v²) for v. A variance shared by several elements
    has the sum of their information. (m, v) are not natural parameters, so that H is not the loss's Hessian.

    Outputs are the pair (mean, variance). When the variance does not come from the model, the outputs are the mean
    alone and the targets are the pair (target, variance), the variance a tensor or a number; H is then diag(c/v).
    The variance has the mean's shape, or that shape without its last dimension, or with one dimension of size 1.

    Attributes:
        eps: variances below it are raised to it, as in torch (which lets the gradient through all the same).
        full: whether the loss has the constant ½ log 2π in it.
        reduction: "mean" over all elements of the mean, or "sum".

    Raises:
        ConfigError: eps not positive, or a reduction other than these.
    """

    eps: float = 1e-6
    full: bool = False

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        if not self.eps > 0:
            raise ConfigError(
                f"eps must be positive, got {self.eps}: a Gaussian of variance 0 has no density"
            )

    def _loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        return self._nll(outputs, targets, self.full, self.reduction)

    def _log_prob(self, outputs: Outputs, targets: Targets) -> Tensor:
        return -self._nll(outputs, targets, True, "none")

    def _nll(self, outputs: Outputs, targets: Targets, full: bool, reduction: str) -> Tensor:
        mean, variance = _moments(outputs, targets)
        target = like(_target(targets), mean)
        return F.gaussian_nll_loss(mean, target, variance, full=full, eps=self.eps, reduction=reduction)

    def _sample(self, outputs: Outputs, generator: torch.Generator | None) -> Tensor:
        if isinstance(outputs, Tensor):
            raise OutputError(
                "to sample, HeteroscedasticGaussian needs a variance: pass outputs=(mean, variance)"
            )
        mean, variance = outputs
        return _noise(mean, generator).mul_(self._spread(variance, mean).sqrt()).add_(mean).to(mean.dtype)

    @property
    def _weighted_by_targets(self) -> bool:
        return True  # a fixed variance comes with them

    def _check_outputs(self, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            return check_tensor(
                "HeteroscedasticGaussian", outputs, "one tensor of means, or (mean, variance)"
            )
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            got = f"a tuple of {len(outputs)}" if isinstance(outputs, tuple) else type(outputs).__name__
            raise OutputError(
                f"HeteroscedasticGaussian reads the pair (mean, variance), or a mean alone, got {got}; say where they "
                "are, for example outputs=lambda o: (o.mean, o.variance)"
            )
        mean, variance = outputs
        check_tensor("HeteroscedasticGaussian", mean, "a tensor as mean")
        check_tensor("HeteroscedasticGaussian", variance, "a tensor as variance")
        _check_variance(mean, variance, OutputError)

    def _check_targets(self, outputs: Outputs, targets: Any, values: bool) -> None:
        if isinstance(outputs, tuple):
            if isinstance(targets, tuple):
                raise TargetError(
                    "the outputs have a variance already; pass targets as one tensor, without another"
                )
            return check_same_shape("HeteroscedasticGaussian", outputs[0], targets)
        if not isinstance(targets, tuple) or len(targets) != 2:
            raise TargetError(
                "the outputs are a mean alone, so the variance has to come with the targets: pass "
                "targets=(target, variance), or outputs=(mean, variance)"
            )
        check_same_shape("HeteroscedasticGaussian", outputs, targets[0])
        variance = targets[1]
        if isinstance(variance, Tensor):
            _check_variance(outputs, variance, TargetError)
        elif not isinstance(variance, (int, float)) or not variance >= 0:
            raise TargetError(
                f"the variance must be a tensor or a number that is not negative, got {variance!r}"
            )

    def _information(self, outputs: Outputs, targets: Targets | None) -> Outputs:
        mean, variance = _moments(outputs, targets)
        precision = self._spread(variance, mean).reciprocal()
        c = self._constant(mean.numel())
        if isinstance(outputs, Tensor):
            return precision.mul_(c)
        return c * precision, _gather(precision.square().mul_(c / 2), variance)

    def _divergence(self, outputs: Outputs, other: Outputs, targets: Targets | None) -> Tensor:
        (mean, variance), (mean_, variance_) = _moments(outputs, targets), _moments(other, targets)
        v, v_ = self._spread(variance, mean), self._spread(variance_, mean_)
        kl = 0.5 * ((v_ / v).log() + (v + (mean - mean_).square()) / v_ - 1)
        return kl * self._constant(mean.numel())

    def _sampled_signal(
        self, outputs: Outputs, targets: Targets | None, generator: torch.Generator | None
    ) -> Outputs:
        mean, variance = _moments(outputs, targets)
        return self._score(outputs, _noise(mean, generator).neg_(), variance)

    def _empirical_signal(self, outputs: Outputs, targets: Targets) -> Outputs:
        mean, variance = _moments(outputs, targets)
        residual = mean.to(working_dtype(mean)) - like(_target(targets), mean)
        return self._score(outputs, residual * self._spread(variance, mean).rsqrt(), variance)

    def _score(self, outputs: Outputs, standard: Tensor, variance: Tensor) -> Outputs:
        """sqrt(c) ∇nll, where `standard` is (m − y)/sqrt(v)."""
        spread = self._spread(variance, standard)
        root = math.sqrt(self._constant(standard.numel()))
        of_mean = root * standard * spread.rsqrt()
        if isinstance(outputs, Tensor):
            return of_mean.to(outputs.dtype)
        of_variance = (0.5 * root) * (1 - standard.square()) / spread
        return of_mean.to(outputs[0].dtype), _gather(of_variance, variance).to(outputs[1].dtype)

    def _spread(self, variance: Tensor, mean: Tensor) -> Tensor:
        """The variance of each element of the mean, raised to eps, in at least float32."""
        return _aligned(variance, mean).to(working_dtype(mean)).clamp_min(self.eps).expand(mean.shape)


def _noise(z: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(z.shape, generator=generator, dtype=working_dtype(z), device=z.device)


def _moments(outputs: Outputs, targets: Targets | None) -> tuple[Tensor, Tensor]:
    """Mean and variance, from whichever side the variance comes."""
    if isinstance(outputs, tuple):
        return outputs[0], outputs[1]
    if not isinstance(targets, tuple):
        raise TargetError(
            "the outputs are a mean alone: pass targets=(target, variance), or outputs=(mean, variance)"
        )
    variance = targets[1]
    return outputs, variance if isinstance(variance, Tensor) else torch.full_like(outputs, variance)


def _target(targets: Targets) -> Tensor:
    """The target itself, without a variance beside it."""
    target = targets[0] if isinstance(targets, tuple) else targets
    assert isinstance(target, Tensor)  # _check_targets has seen to it
    return target


def _aligned(variance: Tensor, mean: Tensor) -> Tensor:
    """The variance with as many dimensions as the mean, so that it broadcasts to it."""
    lacks_last = variance.shape != mean.shape and variance.shape == mean.shape[:-1]
    return variance.unsqueeze(-1) if lacks_last else variance


def _gather(values: Tensor, variance: Tensor) -> Tensor:
    """The sum of the values that share a variance, in the variance's shape."""
    return values.sum_to_size(_aligned(variance, values).shape).view(variance.shape)


def _check_variance(mean: Tensor, variance: Tensor, error: type[OutputError] | type[TargetError]) -> None:
    # torch's own rule (F.gaussian_nll_loss): equal shapes, no last dimension, or one dimension of size 1.
    aligned = _aligned(variance, mean)
    odd = [n for n, m in zip(aligned.shape, mean.shape, strict=False) if n != m]
    if aligned.ndim != mean.ndim or odd not in ([], [1]):
        raise error(
            f"the variance's shape must be the mean's, {tuple(mean.shape)}, or that without its last dimension or "
            f"with one dimension of size 1; got {tuple(variance.shape)}"
        )
    bounds = value_range(variance)
    if bounds is not None and not bounds[0] >= 0:
        raise error(
            f"the variance must not be negative, its least entry is {bounds[0]:g}; exp or softplus makes it so"
        )
