"""The natural policy gradient: δ = −α (F + λI)⁻¹∇h of a surrogate loss, with α from a trust region."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ConfigError, NonFiniteError, StepError
from natgrad.optim.evaluation import dot, norm_of, require_finite_direction
from natgrad.optim.plumbing import Plumbing, Vector
from natgrad.optim.policy import Policy
from natgrad.optim.surrogate import Surrogate
from natgrad.steps import Trial, TrustRegion


class TrustRegionSteps(Plumbing):
    """The steps of an optimiser that is given the states, actions and advantages of a policy."""

    def _step_on_policy(self, policy: Policy) -> Tensor:
        """One step; returns the surrogate loss before it."""
        region = self.step_size
        if not isinstance(region, TrustRegion):
            raise ConfigError(
                "a policy's step is bounded by its divergence: build the optimiser with lr=natgrad.TrustRegion()"
            )
        if policy.model is not self.model:
            raise ConfigError("natgrad.policy was given another model than the optimiser")
        if policy.outputs is None:
            policy = dataclasses.replace(policy, outputs=self._watcher.user_outputs)
        self._begin()
        norm = float("nan")
        try:
            with self._watcher.paused():
                with self._timed("evaluate"):
                    surrogate = Surrogate(policy, self.likelihood, self._curvature)
                    gradient = surrogate.gradient(self._moving())
                    norm = norm_of(gradient)
                    surrogate.observe()
                with self._timed("solve"):
                    direction = self._towards(gradient, surrogate.unit)
                with self._timed("search"):
                    record = self._searched(region, surrogate, gradient, direction)
        except NonFiniteError as error:
            self._skip(str(error), None, norm)
            return torch.full((), float("nan"))
        self._finish({"loss": surrogate.loss, "damping": self.damping, "grad_norm": norm, **record})
        return torch.tensor(surrogate.loss, dtype=policy.advantages.dtype)

    def _moving(self) -> dict[str, Tensor]:
        """The parameters of the groups that are not frozen."""
        members = self._members.members
        return {n: m.parameter for n, m in members.items() if not self.param_groups[m.group]["frozen"]}

    def _towards(self, gradient: Vector, unit: float) -> Vector:
        """Δ = −(F + λI)⁻¹∇h with F in nats per state, whatever the likelihood's reduction."""
        damping = dict.fromkeys(gradient, self.damping * unit)
        direction = self._curvature.direction(gradient, damping, self._step)
        require_finite_direction(dot(gradient, direction))
        return direction if unit == 1.0 else {name: d * unit for name, d in direction.items()}

    def _searched(
        self, region: TrustRegion, surrogate: Surrogate, gradient: Vector, direction: Vector
    ) -> dict[str, Any]:
        """Goes along Δ as far as the region lets it; each group's part times its lr."""
        rates = {name: self._at(name)[0]["lr"] for name in direction}
        step = {name: d * rates[name] for name, d in direction.items()}
        same = all(rate == 1.0 for rate in rates.values())
        whole, *rest = surrogate.curvature([direction] if same else [direction, step])
        curvature = rest[0] if rest else whole
        slope = dot(gradient, step)

        def moved(alpha: float) -> Vector:
            return {name: torch.add(self._at(name)[1], d, alpha=alpha) for name, d in step.items()}

        def attempt(alpha: float) -> Trial | None:
            return surrogate.attempt(moved(alpha))

        alpha, trial = region.search(slope, whole, attempt)
        if trial is None:
            return {"alpha": 0.0, "step_norm": 0.0}
        for name, value in moved(alpha).items():
            self._at(name)[1].copy_(value)
        return {
            "alpha": alpha,
            "predicted": alpha * slope,
            "actual": trial.change,
            "rho": trial.change / (alpha * slope),
            "step_norm": alpha * max(curvature, 0.0) ** 0.5,
        }


def check_policy_call(step_size: object) -> None:
    """Raises StepError where an optimiser with a trust region is asked for a step on anything but a policy."""
    if isinstance(step_size, TrustRegion):
        raise StepError(
            "lr=TrustRegion() takes a step on a policy: step(natgrad.policy(model, observations, actions, advantages))"
        )
