"""Counts given the logarithm of their rate: `torch.nn.PoissonNLLLoss(log_input=True)`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.errors import TargetError
from natgrad.likelihoods.base import like, working_dtype
from natgrad.likelihoods.checks import check_reduction, check_same_shape, check_tensor, value_range
from natgrad.likelihoods.diagonal import DiagonalLikelihood


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Poisson(DiagonalLikelihood):
    """y ~ Poisson(exp(z)), an event for each element of the outputs.

    h = c Σ [exp(z) − y z] and H = diag(c exp(z)): for this loss, the Hessian in z.

    Attributes:
        full: whether the loss has torch's Stirling approximation of log y! in it, which no gradient sees.
        reduction: "mean" over all elements, or "sum".

    Raises:
        ConfigError: a reduction other than these.
    """

    full: bool = False

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def _loss(self, z: Tensor, targets: Tensor) -> Tensor:
        return F.poisson_nll_loss(
            z, like(targets, z), log_input=True, full=self.full, reduction=self.reduction
        )

    def _log_prob(self, z: Tensor, targets: Tensor) -> Tensor:
        y = like(targets, z)
        return y * z - z.exp() - torch.lgamma(y + 1)

    def _sample(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return _draw(torch.exp(z.to(working_dtype(z))), generator).to(z.dtype)

    @property
    def _weighted_by_targets(self) -> bool:
        return False

    def _check_outputs(self, outputs: Any) -> None:
        check_tensor("Poisson", outputs, "one tensor of log-rates")

    def _check_targets(self, outputs: Tensor, targets: Any, values: bool) -> None:
        check_same_shape("Poisson", outputs, targets)
        bounds = value_range(targets) if values else None
        if bounds is not None and not bounds[0] >= 0:
            raise TargetError(f"Poisson expects counts, which are at least 0, got {bounds[0]:g}")

    def _information(self, z: Tensor, targets: Tensor | None) -> Tensor:
        return torch.exp(z.to(working_dtype(z))).mul_(self._constant(z.numel()))

    def _divergence(self, z: Tensor, other: Tensor, targets: Tensor | None) -> Tensor:
        step = other - z
        return z.exp() * (step.expm1() - step) * self._constant(z.numel())

    def _sampled_signal(self, z: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        rate = torch.exp(z.to(working_dtype(z)))
        return rate.sub_(_draw(rate, generator)).mul_(self._constant(z.numel()) ** 0.5).to(z.dtype)

    def _empirical_signal(self, z: Tensor, targets: Tensor) -> Tensor:
        rate = torch.exp(z.to(working_dtype(z)))
        return rate.sub_(like(targets, z)).mul_(self._constant(z.numel()) ** 0.5).to(z.dtype)


def _draw(rate: Tensor, generator: torch.Generator | None) -> Tensor:
    # torch.poisson raises on NaN; a NaN rate is to give a NaN signal, as in the other families.
    return torch.poisson(rate.nan_to_num(nan=0.0), generator=generator)
