"""The surrogate loss of a policy around the present parameters, and the divergence that steps away from them make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import NonFiniteError, OutputError, TargetError
from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import bare
from natgrad.optim.curvature import Curvature
from natgrad.optim.model import Probe
from natgrad.optim.policy import Policy
from natgrad.steps import Trial
from natgrad.tape import evaluate
from natgrad.tape.outputs import find_outputs

Vector = Mapping[str, Tensor]


class Surrogate:
    """h(θ) = −mean_n π_θ(aₙ|sₙ)/π_old(aₙ|sₙ) Aₙ, with π_old the policy at the present θ.

    The model is left as it was found: other parameters are tried in the place of its own.

    Args:
        policy: states, actions and advantages.
        likelihood: π.
        curvature: the estimates of F; they observe the states if they are due.

    Attributes:
        loss: h at the present θ, in the advantages' unit.
        unit: one nat per state on the scale of the likelihood's F and divergence.

    Raises:
        OutputError, TargetError: the outputs or the actions don't fit the likelihood.
        NonFiniteError: an advantage, a log-probability or a signal is not finite.
    """

    def __init__(self, policy: Policy, likelihood: Likelihood, curvature: Curvature) -> None:
        self._policy, self._likelihood, self._curvature = policy, likelihood, curvature
        if not bool(torch.isfinite(policy.advantages).all()):
            raise NonFiniteError("an advantage is not finite")
        self.loss = -float(policy.advantages.double().mean())
        self._random = torch.get_rng_state()
        self._with_graph = self._forward()
        self._outputs = tuple(z.detach() for z in self._with_graph)
        actions = policy.batch.targets
        likelihood.check(bare(self._outputs), actions)
        # Not that a likelihood would ignore them: cross-entropy skips -100, which no policy draws.
        if not actions.is_floating_point() and actions.dtype != torch.bool and int(actions.min()) < 0:
            raise TargetError(f"actions are counted from 0, but one is {int(actions.min())}")
        self._log_prob = self._log_prob_of(self._outputs)
        if not bool(torch.isfinite(self._log_prob).all()):
            raise NonFiniteError("the logarithm of an action's probability is not finite")
        self.unit = likelihood.unit(bare(self._outputs), policy.batch.examples)

    def _forward(self) -> tuple[Tensor, ...]:
        batch = self._policy.batch
        with self._curvature.recording():
            return self._find(self._policy.model(*batch.args, **batch.kwargs))

    def _find(self, returned: object) -> tuple[Tensor, ...]:
        return find_outputs(returned, self._policy.outputs, "natgrad.policy")

    def _log_prob_of(self, outputs: tuple[Tensor, ...]) -> Float[Tensor, "N"]:
        """Log π(aₙ|sₙ), the sum over an action's parts."""
        events = self._likelihood.log_prob(bare(outputs), self._policy.batch.targets)
        return events.reshape(self._policy.batch.examples, -1).sum(1)

    def observe(self) -> None:
        """Lets the estimates of F see the states.

        Raises:
            NonFiniteError: a signal is not finite.
        """
        with self._curvature.reading():
            if self._curvature.due():
                self._curvature.observe(self._with_graph, None, self._policy.batch.examples)

    def gradient(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """∇h by name, of those parameters that π depends on.

        Raises:
            OutputError: it depends on none.
        """
        with torch.enable_grad():
            h = -(self._log_prob_of(self._with_graph) * self._policy.advantages).mean()
        if not h.requires_grad:
            raise OutputError("the policy depends on no parameter that is trained")
        found = torch.autograd.grad(h, list(parameters.values()), retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    def curvature(self, directions: Sequence[Vector]) -> list[float]:
        """ΔᵀFΔ of each direction, in nats per state, with the exact F at these states."""
        states = replace(self._policy.batch, targets=None)
        after = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            probe = Probe(self._policy.model, self._likelihood, self._find, [states], [1.0])
            fisher = probe.expand(directions)[2]
        finally:
            torch.set_rng_state(after)
        return (fisher.diagonal() / self.unit).tolist()

    def attempt(self, moved: Vector) -> Trial | None:
        """What other parameters do; None where it is not finite.

        Args:
            moved: name → value.
        """
        policy = self._policy
        outputs = evaluate(policy.model, moved, policy.batch, self._find, self._random)
        try:
            ratio = (self._log_prob_of(outputs) - self._log_prob).double()
            divergence = self._likelihood.divergence(bare(self._outputs), bare(outputs))
        except OutputError:  # they fitted before: a value is out of range now, such as a variance
            return None
        change = -float((torch.expm1(ratio) * policy.advantages.double()).mean())
        nats = float(divergence.sum()) / self.unit
        return Trial(change, nats) if math.isfinite(change) and math.isfinite(nats) else None
