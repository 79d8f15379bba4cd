"""Residuals: equations that are to hold, rather than labels that are to be met."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ConfigError, EmptyError, NonFiniteError, OutputError
from natgrad.likelihoods.checks import check_tensor
from natgrad.likelihoods.diagonal import DiagonalLikelihood
from natgrad.likelihoods.residualblock import WORKING, ResidualBlock
from natgrad.likelihoods.scores import Scores


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Residuals(DiagonalLikelihood):
    """h(θ) = ½ Σ_b w_b mean_n ‖r_b,n(θ)‖²: r ~ N(0, 1), so that F = Σ_b w_b/N_b J_bᵀJ_b is the Gauss–Newton matrix.

    It is the default likelihood of an optimiser that is given none. Its outputs are scaled residuals, see `blocks`.

    Attributes:
        weights: w_b by the name of a block; 1 where a name is left out.

    Raises:
        ConfigError: a weight that is not finite or not positive.
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reduction: str = "sum"

    def __post_init__(self) -> None:
        if self.reduction != "sum":
            raise ConfigError(
                "the residuals of a block are averaged, and blocks are summed: leave reduction out"
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"the weight of {name!r} is {weight}; it must be finite and positive")

    def blocks(self, returned: object, *, trained: bool = True) -> tuple[ResidualBlock, ...]:
        """The blocks of what a closure returned.

        Args:
            returned: a tensor r [N] or [N, C], real or complex (a complex residual counts as two real ones), or a
                mapping of names to such tensors; or `Scores`.
            trained: whether they must depend on a parameter.

        Raises:
            OutputError: something else; a loss, for example. Says what to return.
            EmptyError: there are no residuals.
            NonFiniteError: a residual is not finite; says which.
            ConfigError: a weight was given for a block that isn't there.
        """
        if isinstance(returned, Scores):
            return (returned.block(),)
        named = returned if isinstance(returned, Mapping) else {"residuals": returned}
        if not named:
            raise EmptyError("the closure returned an empty dict: there are no residuals")
        unknown = [name for name in self.weights if name not in named]
        if unknown:
            raise ConfigError(
                f"there are weights for {', '.join(map(repr, unknown))}, but the closure returned "
                f"{', '.join(map(repr, named))}"
            )
        return tuple(self._block(str(name), value, trained) for name, value in named.items())

    def _block(self, name: str, value: Any, trained: bool) -> ResidualBlock:
        if not isinstance(value, Tensor):
            raise OutputError(
                f"the closure must return residuals, a tensor [N] or [N, C] or a dict of such, but {name} is a "
                f"{type(value).__name__}"
            )
        if value.dtype not in WORKING:
            raise OutputError(
                f"{name} is {value.dtype}; least squares needs float64 (model.double()), or at least float32"
            )
        if value.dim() not in (1, 2):
            hint = "; return the residuals themselves, not their loss" if value.dim() == 0 else ""
            raise OutputError(f"{name} has shape {tuple(value.shape)}, not [N] or [N, C]{hint}")
        if not value.numel():
            raise EmptyError(f"{name} is empty, {tuple(value.shape)}: there are no residuals")
        real = torch.view_as_real(value) if value.is_complex() else value
        real = real.reshape(len(value), -1)
        if not bool(torch.isfinite(real.detach().sum())) and not bool(torch.isfinite(real.detach()).all()):
            n = int((~torch.isfinite(real.detach())).any(1).nonzero()[0])
            raise NonFiniteError(f"{name} is not finite, first at point {n}")
        if trained and not real.requires_grad:
            raise OutputError(
                f"{name} depends on no parameter that is trained; was it made under torch.no_grad(), or detached?"
            )
        return ResidualBlock.of(name, real * math.sqrt(self.weights.get(name, 1.0) / len(value)))

    def _loss(self, z: Tensor, targets: Tensor | None) -> Tensor:
        return 0.5 * z.square().sum()

    def _log_prob(self, z: Tensor, targets: Tensor | None) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def _sample(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return z + torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)

    @property
    def _weighted_by_targets(self) -> bool:
        return False

    def _check_outputs(self, outputs: Any) -> None:
        check_tensor("Residuals", outputs, "one tensor of residuals")

    def _check_targets(self, outputs: Tensor, targets: Any, values: bool) -> None:
        """There are none: residuals are to be zero."""

    def _information(self, z: Tensor, targets: Tensor | None) -> Tensor:
        return torch.ones_like(z)

    def _divergence(self, z: Tensor, other: Tensor, targets: Tensor | None) -> Tensor:
        return 0.5 * (z - other).square()

    def _sampled_signal(self, z: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)

    def _empirical_signal(self, z: Tensor, targets: Tensor | None) -> Tensor:
        return z
