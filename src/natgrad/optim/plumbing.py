"""Everything around the step: hooks, closures, parameter groups, state, and what is not finite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, NonFiniteError, StepError
from natgrad.likelihoods import Likelihood, Residuals, likelihood_from
from natgrad.metrics import Metric
from natgrad.optim.averaging import exchanged, join, weight_of
from natgrad.optim.coverage import Coverage
from natgrad.optim.curvature import Curvature
from natgrad.optim.evaluation import loss_of, not_finite, penalty_of
from natgrad.optim.groups import Membership
from natgrad.optim.info import StepInfo
from natgrad.optim.saving import load_state, save_state
from natgrad.optim.watcher import Watcher
from natgrad.steps import (
    SPRING,
    AdaptiveStep,
    Alarm,
    Confirmation,
    ConstantDamping,
    Damping,
    FixedStep,
    Grafted,
    GridSearch,
    NoiseFloor,
    Pace,
    Promise,
    RelativeDamping,
    ResidualStep,
    StepSize,
    TrustRegion,
    Witness,
    damping_from,
    residual_step_from,
    step_size_from,
)
from natgrad.steps.penalty import L2
from natgrad.tape.plain import original

Vector = dict[str, Tensor]


class Plumbing(torch.optim.Optimizer):
    """What an optimiser must do beside its mathematics; `NaturalGradient` adds the step.

    Attributes:
        likelihood: the likelihood of the loss.
        step_size: the strategy that chooses α and μ.
        damping_rule: the strategy that chooses λ.
        damping: λ at present.
        info: what the last step did.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: nn.Module | Likelihood | None = None,
        params: Iterable[Any] | None = None,
        *,
        metric: str | Metric = "kfac",
        lr: float | StepSize | ResidualStep | None = None,
        momentum: float | None = None,
        damping: float | Damping | None = None,
        weight_decay: float | L2 = 0.0,
        fallback: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        outputs: Callable[[Any], Any] | None = None,
        targets: Callable[..., Any] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        seed: int = 0,
    ) -> None:
        self._recipe = {
            "model": model,
            "likelihood": likelihood,
            "metric": metric,
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "fallback": fallback,
            "outputs": outputs,
            "targets": targets,
            "on_nonfinite": on_nonfinite,
            "seed": seed,
        }
        if on_nonfinite not in ("raise", "skip"):
            raise ConfigError(f"on_nonfinite must be 'raise' or 'skip', not {on_nonfinite!r}")
        self.likelihood = Residuals() if likelihood is None else likelihood_from(likelihood)
        on_residuals = isinstance(self.likelihood, Residuals)
        self.model = original(model)
        self._members = Membership(self.model, params, metric, weight_decay)
        tempered = self._members.tempered
        self.step_size: StepSize | ResidualStep | None = (
            residual_step_from(lr, momentum) if on_residuals else step_size_from(lr, momentum, tempered)
        )
        # ρ needs the loss, so it needs the targets, or residuals.
        measurable = isinstance(likelihood, nn.Module) or on_residuals or targets is not None
        unit_free = all(metric.by_layer for metric, _ in self._members.by_metric()) and not any(
            group["l2"] for group in self._members.groups
        )
        self.damping_rule = damping_from(
            damping,
            isinstance(self.step_size, AdaptiveStep) and measurable,
            tempered,
            relative=isinstance(self.step_size, Grafted) and unit_free,
        )
        relative = isinstance(self.damping_rule, RelativeDamping)
        if relative and not (unit_free and isinstance(self.step_size, (FixedStep, Grafted))):
            raise ConfigError(
                "RelativeDamping goes with lr= and a metric that damps layer by layer (KFAC, EKFAC, Diagonal), and not "
                "with L2: give a number as damping"
            )
        if not measurable and not isinstance(self.damping_rule, (ConstantDamping, RelativeDamping)):
            raise ConfigError(
                "this damping needs the loss at the new parameters, which a likelihood alone does not tell; pass the "
                "torch.nn loss, or targets=, or a number as damping"
            )
        if targets is not None and not isinstance(likelihood, Likelihood):
            raise ConfigError(
                "the loss tells the targets; targets= is for a likelihood, where the model has the loss"
            )
        self.damping = self.damping_rule.initial
        self.info = StepInfo()
        if tempered and (on_residuals or isinstance(self.step_size, TrustRegion)):
            raise ConfigError(
                "a tempered metric is for losses on mini-batches; residuals and policies need the natural gradient "
                'itself: metric="exact", or EKFAC(power=1)'
            )
        self._on_nonfinite = on_nonfinite
        self._step, self._skipped, self._batch = 0, 0, 0
        self._witness: Witness | None = None
        self._promise: Promise | None = None
        self._confirmation = Confirmation()
        self._pace = Pace()
        self._alarm = Alarm()
        self._seconds: dict[str, float] = {}
        self._agreed: set[object] = set()
        self._finds_damping = damping is None
        if isinstance(self.damping_rule, NoiseFloor) and not isinstance(self.step_size, (SPRING, GridSearch)):
            raise ConfigError("NoiseFloor goes with lr=, natgrad.SPRING or GridSearch on residuals")
        if on_residuals and any(group["weight_decay"] or group["l2"] for group in self._members.groups):
            raise ConfigError(
                "the decay of weights is a residual too: return {..., 'decay': η**0.5 * θ} beside yours"
            )
        if isinstance(self.step_size, Grafted) and not (
            relative or isinstance(self.damping_rule, ConstantDamping)
        ):
            raise ConfigError("Grafted leaves no step to measure: give a number as damping beside it")
        if isinstance(self.step_size, TrustRegion):
            self._check_trust_region(fallback)
        small_steps = isinstance(self.step_size, (FixedStep, Grafted))
        self._built = False
        self._away = False
        super().__init__(self._members.groups, _defaults(self.step_size))
        for index, group in enumerate(self.param_groups):
            if not 0 <= group.get("momentum", 0.0) < 1:
                raise ConfigError(f"momentum={group['momentum']} of group {index} must lie in [0, 1)")
        self._built = True
        self._curvature = Curvature(self._members, self.likelihood, seed, fallback, small_steps, relative)
        self._watcher = Watcher(
            model,
            likelihood if isinstance(likelihood, nn.Module) else None,
            self.likelihood,
            outputs,
            targets,
            self._curvature.tapes,
            self._curvature.due,
            self._curvature.observe,
            self._curvature.begins,
        )

    def _check_trust_region(self, fallback: object) -> None:
        if not isinstance(self.damping_rule, ConstantDamping):
            raise ConfigError("the trust region bounds the step already: give a number as damping beside it")
        if any(group["weight_decay"] or group["l2"] for group in self._members.groups):
            raise ConfigError("the trust region measures the policy's divergence: leave weight_decay out")
        if fallback is not None:
            raise ConfigError("a fallback optimiser's step would leave the trust region: leave fallback= out")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the batches that were seen since the last step."""
        super().zero_grad(set_to_none)
        if self._built:
            self._watcher.clear()
            self._curvature.restart(self._step)

    def coverage(self) -> Coverage:
        """Which rule covers which parameter; complete after the first forward pass and loss."""
        return self._curvature.coverage()

    @property
    def averages(self) -> bool:
        """Whether an average of the iterates is kept: where steps are adaptive and a loss is trained."""
        return self._present_weight is not None

    @property
    def _present_weight(self) -> float | None:
        """What the present θ counts in the average; None where none is kept."""
        size = self.step_size
        if not isinstance(size, AdaptiveStep) or size.average is None:
            return None
        seen = self._confirmation
        return weight_of(self._step, size.average, seen.ratio if seen.count else 0.0)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """``with optimizer.averaged():`` evaluates or saves the model at the average of its iterates.

        The parameters are θ̄ inside; after it they and all buffers are as they were. Running statistics, as of
        `nn.BatchNorm2d`, are those of the last steps: ``torch.optim.swa_utils.update_bn(loader, model)`` inside makes
        them anew for θ̄. See `natgrad.optim.averaging` for the average.

        Raises:
            StepError: no average is kept, or `step` is called inside.
        """
        weight = self._present_weight
        if weight is None:
            raise StepError(
                "no average is kept: it goes with adaptive steps on a loss (lr=None); with a learning rate of your own "
                "use a schedule, or torch.optim.swa_utils.AveragedModel"
            )
        if self._away:
            raise StepError("the parameters are the average already")
        self._away = True
        try:
            with exchanged(list(self._members.members), self._at, weight, self._members.buffers()):
                yield
        finally:
            self._away = False

    def _join_average(self) -> None:
        """The present θ joins the average, now that its loss has been seen."""
        weight = self._present_weight
        if weight is not None:
            join(self._members.members, self._at, weight)

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's optimisers, and under "natgrad" λ, the averages and the generator."""
        return save_state(self, super().state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores a run: its next steps are the same to the last bit.

        Raises:
            StateError: the state belongs to another model, other groups or another version.
        """
        load_state(self, state_dict, super().load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is built from, by `copy.deepcopy` or pickle: model and loss go with it, as `optimizer.model`."""
        return {"recipe": self._recipe, "groups": self._members.described(), "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Builds the copy, or takes over what torch read of a state dict."""
        if "recipe" not in state:
            super().__setstate__(state)
            for group in self.param_groups:  # saved before a group held it
                for key, value in _defaults(self.step_size).items():
                    group.setdefault(key, value)
            return
        self.__init__(params=state["groups"], **state["recipe"])  # type: ignore[misc]
        self.load_state_dict(state["state"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimiser is being built: curvature is kept for a fixed set of parameters.

        Raises:
            ConfigError: after that.
        """
        if self._built:
            raise ConfigError(
                "a NaturalGradient's groups are fixed; build a new optimiser for other parameters"
            )
        super().add_param_group(param_group)

    _built = False

    def _begin(self) -> None:
        """Begins a step that brings its own batch."""
        self._members.check_unchanged()
        self._seconds = {}
        self._curvature.restart(self._step)
        self._batch += 1

    def _evaluate(self, closure: Callable[[], Tensor | float] | None) -> Tensor | float | None:
        if closure is None:
            return None
        with torch.enable_grad():  # micro-batches may have gone before, as Lightning has it
            return closure()

    def _loss(self, returned: Tensor | float | None) -> float | None:
        """h(θ) with the penalty."""
        value = loss_of(self._watcher, returned, self.likelihood.reduction == "sum")
        return None if value is None else value + penalty_of(self.param_groups)

    def _finite(self, loss: float | None, norm: float, gradient: Vector) -> bool:
        """Raises or counts when something is not finite; nothing has been changed by then."""
        self._batch += 1
        what = not_finite(loss, norm, gradient, self._curvature.trouble)
        if what is None:
            return True
        self._skip(what, loss, norm)
        return False

    def _skip(self, what: str, loss: float | None, norm: float) -> None:
        """Raises, or counts a step that was not taken."""
        self._skipped += 1
        self._watcher.stepped()
        self._curvature.restart(self._step)
        if self._on_nonfinite == "raise":
            raise NonFiniteError(
                f"{what} in step {self._step + 1}, batch {self._batch}; no parameter was changed. Look at that batch, "
                'or pass on_nonfinite="skip"'
            )
        self.info = StepInfo(
            step=self._step, loss=loss, damping=self.damping, grad_norm=norm, skipped=self._skipped
        )

    def _finish(self, record: dict[str, Any]) -> None:
        self._step += 1
        self.info = StepInfo(
            step=self._step,
            observed=self._curvature.observed,
            skipped=self._skipped,
            stages=self._curvature.stages(),
            seconds=self._seconds,
            **record,
        )
        self._watcher.stepped()
        self._curvature.restart(self._step)

    def _unit(self) -> float:
        """One nat per example on the scale of the loss."""
        return float(self._watcher.examples) if self.likelihood.reduction == "sum" else 1.0

    def _dampings(self, names: Iterable[str], damping: float | None = None) -> dict[str, float]:
        """λ + η by name."""
        damping = self.damping if damping is None else damping
        return {name: damping + self._at(name)[0]["l2"] for name in names}

    def _at(self, name: str) -> tuple[dict[str, Any], nn.Parameter, dict[str, Any]]:
        member = self._members.members[name]
        return self.param_groups[member.group], member.parameter, self.state[member.parameter]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start


def _defaults(size: StepSize | ResidualStep | None) -> dict[str, Any]:
    """What each group holds, so that schedulers may change it: they cycle a momentum, or β₁, where there is one."""
    if isinstance(size, FixedStep):
        return {"lr": size.lr, "momentum": size.momentum}
    if isinstance(size, Grafted):
        return {"lr": size.lr, "betas": size.betas}
    return {"lr": 1.0}
