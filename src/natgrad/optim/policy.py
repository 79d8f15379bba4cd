"""What a step of the natural policy gradient is made from: visited states, the actions taken, and their advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import TargetError
from natgrad.information.data import batch_of
from natgrad.tape import Batch


@dataclass(frozen=True, eq=False)
class Policy:
    """A batch for `NaturalGradient.step`; made by `natgrad.policy`.

    Attributes:
        model: the policy.
        batch: the observations, with the actions as targets.
        advantages: how much better each action was than the policy's mean action there.
        outputs: what the likelihood reads of what the model returns.
    """

    model: nn.Module
    batch: Batch
    advantages: Float[Tensor, "N"]
    outputs: Callable[[Any], Any] | None = None


def policy(
    model: nn.Module,
    observations: Any,
    actions: Any,
    advantages: Any,
    *,
    outputs: Callable[[Any], Any] | None = None,
) -> Policy:
    """What to give to `step` in the natural policy gradient (Kakade 2001; with a trust region: Schulman et al. 2015).

        trust = natgrad.TrustRegion(kl=0.01)
        optimizer = natgrad.NaturalGradient(model, natgrad.Categorical(), metric="exact", lr=trust)
        optimizer.step(natgrad.policy(model, observations, actions, advantages))

    The surrogate loss is h(θ) = −mean_n π_θ(aₙ|sₙ)/π_old(aₙ|sₙ) Aₙ, π_old being the policy before the step, and F is
    the Fisher information of π_θ(·|sₙ), averaged over the states. An action of several parts, such as D numbers with
    `Gaussian`, has the product of their probabilities. `Gaussian` has unit variance; a policy with a variance of its
    own returns (mean, variance) and takes `HeteroscedasticGaussian`.

    Args:
        model: the optimiser's model: observations to the parameters of π.
        observations: N of them in a tensor, or in a tuple of the model's arguments or a dict of its keyword arguments.
        actions: a tensor of what was drawn from π at each, laid out as the likelihood's targets.
        advantages: a tensor of each action's, [N]. Their scale does not matter.
        outputs: what the likelihood reads of what the model returns; the optimiser's `outputs` if None.

    Raises:
        EmptyError: there are no observations.
        ConfigError: the observations can't be read.
        TargetError: actions or advantages of another length.
    """
    batch = batch_of((observations, actions), "the policy's batch")
    count = batch.examples
    if not isinstance(actions, Tensor) or not actions.dim() or len(actions) != count:
        raise TargetError(f"there are {count} observations, but the actions are {_shape(actions)}")
    if (
        not isinstance(advantages, Tensor)
        or not advantages.is_floating_point()
        or advantages.shape != (count,)
    ):
        raise TargetError(
            f"advantages must be {count} floating-point numbers, one for each observation, not {_shape(advantages)}"
        )
    return Policy(model, batch, advantages.detach(), outputs)


def _shape(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
