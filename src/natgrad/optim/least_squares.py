"""The step on residuals: δ = −(F + λI)⁻¹ Jᵀr, where a closure returns r(θ) and F is its Gauss–Newton matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ConfigError, NonFiniteError, StallWarning, StepError, announce
from natgrad.likelihoods import Residuals
from natgrad.operators import ParameterSpace
from natgrad.optim.linearised import Linearised
from natgrad.optim.plumbing import Plumbing
from natgrad.steps import (
    SPRING,
    AdaptiveSPRING,
    CurvedSearch,
    Decision,
    GridSearch,
    NoiseFloor,
    half_square,
    predicted_change,
    step_for,
)


class LeastSquaresSteps(Plumbing):
    """The steps of an optimiser whose loss is ½ Σ_b w_b mean ‖r_b‖²."""

    def _step_on_residuals(self, closure: Callable[[], Any] | None) -> Tensor:
        """One step; returns the loss before it."""
        if closure is None:
            raise StepError(
                "this optimiser was given no loss, so that it takes residuals: call step(lambda: residuals), or give "
                "it the loss"
            )
        assert isinstance(self.likelihood, Residuals)
        self._begin()
        try:
            with self._timed("evaluate"), self._watcher.paused():
                problem = Linearised(
                    closure,
                    self.likelihood,
                    self._members,
                    self.param_groups,
                    self._curvature,
                    self._step,
                    self._agreed,
                )
        except NonFiniteError as error:
            self._skip(str(error), None, float("nan"))
            return torch.full((), float("nan"))
        if not problem.movable and (not isinstance(self.step_size, SPRING) or problem.operator is None):
            raise ConfigError(
                "local energies hold at the present parameters only, and their metric is that of centred scores: give "
                'lr=, and metric="exact", "gram", "rectangular" or "sketched"'
            )
        with self._timed("solve"), self._watcher.paused():
            decision = self._decide(problem)
            record = self._account(problem, decision)
        if decision.update is not None:
            self._require_finite_update(decision.update)
            problem.move(decision.update)
        else:
            self._say_stalled(problem.loss)
        if decision.direction is not None:
            self._remember(problem.space, decision.direction)
        self._curvature.fall_back()
        self.damping = decision.following
        self._finish(record)
        return torch.tensor(problem.loss, dtype=problem.residuals.dtype)

    def _say_stalled(self, loss: float) -> None:
        """Once a run, to whoever goes on after a stalled step: `info.stalled` has told it then."""
        if self._stall_said or not self.info.stalled or loss == 0:
            return
        self._stall_said = True
        announce(
            f"nothing that was tried lowers the loss of {loss:.3g}, for the second step in a row "
            "(optimizer.info.stalled), so that nothing moves. It is a minimum, or as low as rounding lets it; if it "
            "should be lower, begin at other parameters (another seed), give the model more, or work in float64",
            StallWarning,
        )

    _stall_said = False

    def _decide(self, problem: Linearised) -> Decision:
        previous = self._recall(problem.space)
        if isinstance(self.step_size, (SPRING, GridSearch)):
            return self._with_rule(self.step_size, problem, previous)
        assert isinstance(self.step_size, (AdaptiveSPRING, CurvedSearch, NoneType))
        strategy = self.step_size or step_for(problem)
        return strategy.decide(
            problem, None if self._step == 0 and self._finds_damping else self.damping, previous
        )

    def _with_rule(
        self, strategy: SPRING | GridSearch, problem: Linearised, previous: Tensor | None
    ) -> Decision:
        """A step whose λ is the damping rule's."""
        rule = self.damping_rule
        damping = self.damping
        if isinstance(rule, NoiseFloor):
            damping = rule.of(problem.largest, len(problem.residuals), problem.residuals.dtype)
        decision = strategy.decide(problem, damping, previous, self._step)
        if not (rule.due(self._step + 1) and problem.movable and decision.update is not None):
            return decision
        loss, predicted = decision.loss, decision.predicted
        if loss is None or predicted is None:
            loss = half_square(problem.at(decision.update))
            predicted = predicted_change(problem.residuals, problem.image(decision.update))
        ratio = (loss - problem.loss) / predicted if predicted < 0 else math.nan
        following = rule.update(damping, ratio)
        return dataclasses.replace(decision, following=following, loss=loss, predicted=predicted)

    def _require_finite_update(self, update: Tensor) -> None:
        if not bool(torch.isfinite(update.sum())):
            raise NonFiniteError(
                "the step is not finite although the residuals are; no parameter was changed. Raise the damping, or "
                "work in float64"
            )

    def _recall(self, space: ParameterSpace) -> Tensor | None:
        """δ₀; zero for parameters that did not move then."""
        last = {name: self._at(name)[2].get("last") for name in space.names}
        if all(value is None for value in last.values()):
            return None
        return space.flatten(
            {name: torch.zeros_like(self._at(name)[1]) if v is None else v for name, v in last.items()}
        )

    def _remember(self, space: ParameterSpace, direction: Tensor) -> None:
        for name, value in space.unflatten(direction).items():
            self._at(name)[2]["last"] = value.clone()

    def _account(self, problem: Linearised, decision: Decision) -> dict[str, Any]:
        loss = problem.loss
        return {
            **problem.solver(decision.damping),
            "loss": loss,
            "stalled": decision.update is None,
            "damping": decision.damping,
            "alpha": decision.alpha,
            "grad_norm": problem.gradient_norm(),
            "predicted": decision.predicted,
            "actual": None if decision.loss is None else decision.loss - loss,
            "rho": None
            if decision.loss is None or not decision.predicted
            else (decision.loss - loss) / decision.predicted,
        }
