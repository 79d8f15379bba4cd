"""Independent yes-or-no targets given their log-odds: `torch.nn.BCEWithLogitsLoss`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.errors import OutputError, TargetError
from natgrad.likelihoods.base import like, working_dtype
from natgrad.likelihoods.checks import (
    check_reduction,
    check_same_shape,
    check_tensor,
    check_weight,
    value_range,
)
from natgrad.likelihoods.diagonal import DiagonalLikelihood


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Bernoulli(DiagonalLikelihood):
    """y ~ Bernoulli(σ(z)), an event for each element of the outputs.

    h = c Σ w [−q y log σ(z) − (1 − y) log(1 − σ(z))], and H = diag(c s σ(1 − σ)) with s = w (q y + 1 − y): for this
    loss, the Hessian in z. Soft targets in [0, 1] are taken as mixtures of yes and no.

    Attributes:
        weight: w, a weight of each element, broadcast to the outputs. It is known without targets, so it always
            counts.
        pos_weight: q, a weight of positive targets, broadcast to the outputs. It counts where targets are given.
        reduction: "mean" over all elements (the weights don't count), or "sum".

    Raises:
        ConfigError: a negative weight, or a reduction other than these.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        check_weight("weight", self.weight)
        check_weight("pos_weight", self.pos_weight)

    def _loss(self, z: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            z,
            like(targets, z),
            _there(self.weight, z),
            pos_weight=_there(self.pos_weight, z),
            reduction=self.reduction,
        )

    def _log_prob(self, z: Tensor, targets: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(z, like(targets, z), reduction="none")

    def _sample(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return _draw(torch.sigmoid(z.to(working_dtype(z))), generator).to(z.dtype)

    @property
    def _weighted_by_targets(self) -> bool:
        return self.pos_weight is not None

    def _check_outputs(self, outputs: Any) -> None:
        check_tensor("Bernoulli", outputs, "one tensor of logits")
        for name, weight in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if weight is not None and not _broadcasts(weight.shape, outputs.shape):
                raise OutputError(
                    f"Bernoulli's {name} of shape {tuple(weight.shape)} can't be broadcast to the outputs' shape "
                    f"{tuple(outputs.shape)}"
                )

    def _check_targets(self, outputs: Tensor, targets: Any, values: bool) -> None:
        check_same_shape("Bernoulli", outputs, targets)
        bounds = value_range(targets) if values else None
        if bounds is not None and not (bounds[0] >= 0 and bounds[1] <= 1):
            offender = bounds[1] if bounds[0] >= 0 else bounds[0]
            raise TargetError(f"Bernoulli expects targets in [0, 1], got {offender:g}")

    def _scale(self, z: Tensor, targets: Tensor | None) -> float | Tensor:
        """C s for each element, or one for all."""
        scale: float | Tensor = self._constant(z.numel())
        if self.weight is not None:
            scale = scale * self.weight.to(z.device, working_dtype(z))
        if self.pos_weight is not None and targets is not None:
            excess = self.pos_weight.to(z.device, working_dtype(z)) - 1
            scale = scale * torch.addcmul(excess.new_ones(()), excess, targets.to(excess.dtype))
        return scale

    def _information(self, z: Tensor, targets: Tensor | None) -> Tensor:
        p = torch.sigmoid(z.to(working_dtype(z)))
        return torch.addcmul(p, p, p, value=-1).mul_(self._scale(z, targets))

    def _divergence(self, z: Tensor, other: Tensor, targets: Tensor | None) -> Tensor:
        kl = torch.sigmoid(z) * (z - other) + F.softplus(other) - F.softplus(z)
        return kl * self._scale(z, targets)

    def _sampled_signal(self, z: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        p = torch.sigmoid(z.to(working_dtype(z)))
        return p.sub_(_draw(p, generator)).mul_(_root(self._scale(z, targets))).to(z.dtype)

    def _empirical_signal(self, z: Tensor, targets: Tensor) -> Tensor:
        # The gradient of one element's loss is c (s σ − w q y); over sqrt(c s) it is the score's signal.
        p = torch.sigmoid(z.to(working_dtype(z)))
        y = targets.to(p.dtype)
        if self.pos_weight is not None:
            positive = self.pos_weight.to(p.device, p.dtype) * y
            # Where s = 0 any divisor will do: the scale is 0 there.
            y = positive / (positive + 1 - y).clamp_min(torch.finfo(p.dtype).tiny)
        return p.sub_(y).mul_(_root(self._scale(z, targets))).to(z.dtype)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Ones with probability p, in p's type. Four times as fast on a CPU as `torch.bernoulli`."""
    return torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device).lt_(p)


def _root(scale: float | Tensor) -> float | Tensor:
    return scale.sqrt() if isinstance(scale, Tensor) else scale**0.5


def _there(weight: Tensor | None, outputs: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(outputs.device)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether the shape can be expanded to the other."""
    return len(shape) <= len(to) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)
    )
