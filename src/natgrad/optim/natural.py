"""The natural gradient step: θ ← θ + αΔ + μδ₀ with Δ = −(F̂ + λI)⁻¹∇h."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, NonFiniteError, StepError
from natgrad.likelihoods import Likelihood, likelihood_from
from natgrad.metrics import Metric
from natgrad.optim.coverage import Coverage
from natgrad.optim.curvature import Curvature
from natgrad.optim.groups import Membership
from natgrad.optim.info import StepInfo
from natgrad.optim.model import Basis, quadratic_model
from natgrad.optim.saving import load_state, save_state
from natgrad.optim.watcher import Watcher
from natgrad.steps import AdaptiveStep, Damping, FixedStep, StepSize, damping_from, step_size_from
from natgrad.steps.penalty import L2
from natgrad.tape import evaluate

Vector = dict[str, Tensor]


class NaturalGradient(torch.optim.Optimizer):
    """Natural gradient descent for a PyTorch model, in an ordinary training loop.

    With ``lr=None`` nothing is to be tuned: step size and momentum minimise the quadratic model with the exact Fisher
    information, and the damping follows the Levenberg–Marquardt rule (Martens & Grosse 2015, arXiv 1503.05671, §6–7).

    Args:
        model: the model that is trained; its forward pass is watched by a hook.
        likelihood: the torch.nn loss (or a natgrad likelihood) that is trained. A loss's calls are watched by a hook.
        params: parameters or groups of them; all trainable ones by default. A group may have its own ``lr`` (a factor
            of α where steps are adaptive), ``weight_decay``, ``metric`` and ``frozen``.
        metric: the representation of F: ``"kfac"``, ``"diagonal"``, ``"dense"``, ``"euclidean"``, or an object such
            as ``natgrad.KFAC(kind="exact")``.
        lr: a fixed α, or None to adapt it.
        momentum: a fixed μ; by default adapted with α, and 0 where lr is given.
        damping: a fixed λ or a strategy; by default Levenberg–Marquardt, and 1e-3 where lr is given.
        weight_decay: decoupled decay, or ``natgrad.L2(η)`` inside the loss.
        fallback: makes a torch optimiser for parameters that no rule covers, such as
            ``lambda params: torch.optim.AdamW(params, lr=1e-3)``; by default they follow the plain gradient.
        outputs: what the likelihood reads of what the model returns, such as ``lambda o: o.logits``.
        on_nonfinite: ``"raise"``, or ``"skip"`` to count such steps and go on.
        seed: of the Monte-Carlo signals.

    Raises:
        UnsupportedLossError: the loss has no likelihood; says what to pass instead.
        EmptyError: the model has no trainable parameter.
        ConfigError: an argument is out of range. UnknownNameError: no metric has that name.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: nn.Module | Likelihood,
        params: Iterable[Any] | None = None,
        *,
        metric: str | Metric = "kfac",
        lr: float | StepSize | None = None,
        momentum: float | None = None,
        damping: float | Damping | None = None,
        weight_decay: float | L2 = 0.0,
        fallback: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        outputs: Callable[[Any], Any] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        seed: int = 0,
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise ConfigError(f"on_nonfinite must be 'raise' or 'skip', not {on_nonfinite!r}")
        self.likelihood = likelihood_from(likelihood)
        self.step_size = step_size_from(lr, momentum)
        self.damping_rule = damping_from(damping, isinstance(self.step_size, AdaptiveStep))
        self.damping = self.damping_rule.initial
        self.info = StepInfo()
        self.model = model
        self._members = Membership(model, params, metric, weight_decay)
        self._on_nonfinite = on_nonfinite
        self._step, self._skipped, self._batch = 0, 0, 0
        default_lr = self.step_size.lr if isinstance(self.step_size, FixedStep) else 1.0
        self._built = False
        super().__init__(self._members.groups, {"lr": default_lr})
        self._built = True
        self._curvature = Curvature(self._members, self.likelihood, seed, fallback)
        self._watcher = Watcher(
            model,
            likelihood if isinstance(likelihood, nn.Module) else None,
            self.likelihood,
            outputs,
            self._curvature.tapes,
            lambda: self._curvature.due(self._step),
            lambda z, y, n: self._curvature.observe(z, y, n, self._step),
        )

    # ---- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float | None:  # type: ignore[override]
        """One step of natural gradient descent.

        Args:
            closure: clears the gradients, computes the loss, calls backward, and returns the loss; not needed in an
                ordinary loop.

        Returns:
            What the closure returned.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; nothing was changed.
            StepError: no gradient, or no batch was seen.
            ModelChangedError: the model's parameters are not those the optimiser was built with.
        """
        self._seconds: dict[str, float] = {}
        with self._timed("evaluate"):
            returned = self._evaluate(closure)
            self._members.check_unchanged()
            loss = self._loss(returned)
            gradient = self._gradient()  # ∇h(θ)
            norm = self._norm(gradient)
        if not self._finite(loss, norm, gradient):
            return returned
        with self._timed("solve"):
            damping = self.damping  # λ
            direction = self._curvature.direction(gradient, damping, self._step)  # Δ = −(F̂ + λI)⁻¹∇h
        record: dict[str, Any] = {"loss": loss, "damping": damping, "grad_norm": norm}
        if isinstance(self.step_size, FixedStep):
            record |= self._fixed(self.step_size, gradient, direction)
        else:
            assert isinstance(self.step_size, AdaptiveStep)
            record |= self._adaptive(self.step_size, loss, gradient, direction)
        self._curvature.fall_back()
        self._finish(record)
        return returned

    def _fixed(self, size: FixedStep, gradient: Vector, direction: Vector) -> dict[str, Any]:
        """θ ← θ + lr · v, v ← μv + Δ."""
        with self._timed("apply"):
            scale = 1.0
            if size.kl_clip is not None and self._curvature.measures:
                fastest = max(group["lr"] for group in self.param_groups)
                measured = [n for n in direction if self._curvature.measured(n)]
                decrease = -float(sum(torch.sum(gradient[n] * direction[n]) for n in measured))
                scale = size.scale(fastest, decrease)
            for name, delta in direction.items():
                group, p, state = self._at(name)
                p.mul_(1.0 - group["lr"] * group["weight_decay"]) if group["weight_decay"] else None
                delta = delta if scale == 1.0 else delta * scale
                if size.momentum:
                    if "velocity" not in state:
                        state["velocity"] = delta.clone()
                    else:
                        state["velocity"].mul_(size.momentum).add_(delta)
                    delta = state["velocity"]
                p.add_(delta, alpha=group["lr"])
        return {"alpha": scale * self.param_groups[0]["lr"], "momentum": size.momentum}

    def _adaptive(
        self, size: AdaptiveStep, loss: float | None, gradient: Vector, direction: Vector
    ) -> dict[str, Any]:
        """θ ← θ + δ with δ = Σ_k α_k Δ_k + μδ₀, where α and μ minimise the quadratic model M."""
        if loss is None or not self._watcher.batches:
            raise StepError(
                "the adaptive step needs the batch: call the model and the loss that you gave to NaturalGradient "
                "before step(), or give lr="
            )
        previous = {n: self._at(n)[2]["step"] for n in direction if "step" in self._at(n)[2]}
        parts = self._curvature.parts(direction, size.groups if self._step < size.coarse else 1)
        basis = Basis(direction, parts, previous)
        with self._timed("model"), self._watching_paused():
            model = quadratic_model(
                basis,
                loss=loss,
                gradient=gradient,
                damping={n: self.damping + self._at(n)[0]["l2"] for n in direction},
                network=self.model,
                likelihood=self.likelihood,
                batches=self._watcher.batches,
                find_outputs=self._watcher.find_outputs,
                fraction=size.fraction,
                turn=self._step,
            )
            c = size.coefficients(model, basis.previous_index)
        with self._timed("apply"):
            alphas = c[: len(parts)].tolist()
            momentum = 0.0 if basis.previous_index is None else float(c[basis.previous_index])
            self._apply(direction, parts, alphas, momentum)
        record: dict[str, Any] = {
            "alpha": sum(alphas) / len(alphas),
            "momentum": momentum,
            "predicted": model.change(c),
            "step_norm": model.fisher_norm(c),
        }
        if self.damping_rule.due(self._step + 1):
            with self._timed("ratio"), self._watching_paused():
                record |= self._measure(loss, record["predicted"])
        return record

    def _apply(self, direction: Vector, parts: list[list[str]], alphas: list[float], momentum: float) -> None:
        for names, alpha in zip(parts, alphas, strict=True):
            for name in names:
                group, p, state = self._at(name)
                if group["weight_decay"]:
                    p.mul_(1.0 - group["lr"] * abs(alpha) * group["weight_decay"])
                if "step" not in state:
                    state["step"] = direction[name].mul(alpha * group["lr"])
                else:
                    state["step"].mul_(momentum * group["lr"]).add_(
                        direction[name], alpha=alpha * group["lr"]
                    )
                p.add_(state["step"])

    def _measure(self, loss: float, predicted: float) -> dict[str, Any]:
        """ρ = [h(θ+δ) − h(θ)] / [M(δ) − M(0)], and λ after it."""
        watcher = self._watcher
        total = 0.0
        for batch, rng_state in zip(watcher.batches, watcher.rng_states, strict=True):
            outputs = evaluate(self.model, {}, batch, watcher.find_outputs, rng_state)
            value = self.likelihood.loss(outputs if len(outputs) > 1 else outputs[0], batch.targets)
            total += float(value) * (
                1.0 if self.likelihood.reduction == "sum" else 1.0 / len(watcher.batches)
            )
        actual = total + self._penalty() - loss
        ratio = actual / predicted if predicted < 0 else math.nan
        self.damping = self.damping_rule.update(self.damping, ratio)
        return {"actual": actual, "rho": ratio}

    # ---- what the step needs --------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the batches that were seen since the last step."""
        super().zero_grad(set_to_none)
        if self._built and not self._inside_closure:
            self._watcher.clear()
            self._curvature.restart(self._step)

    def coverage(self) -> Coverage:
        """Which rule covers which parameter; complete after the first forward pass and loss."""
        return self._curvature.coverage()

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's optimisers, and under "natgrad" λ, the averages and the generator."""
        return save_state(self, super().state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores a run: its next steps are the same to the last bit.

        Raises:
            StateError: the state belongs to another model, other groups or another version.
        """
        load_state(self, state_dict, super().load_state_dict)

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
    _inside_closure = False

    def _evaluate(self, closure: Callable[[], Tensor | float] | None) -> Tensor | float | None:
        if closure is None:
            return None
        self._watcher.clear()
        self._curvature.restart(self._step)
        self._inside_closure = True
        try:
            with torch.enable_grad():
                return closure()
        finally:
            self._inside_closure = False

    def _loss(self, returned: Tensor | float | None) -> float | None:
        """h(θ) with the penalty: the mean over micro-batches, or their sum if the loss sums."""
        if self._watcher.losses:
            values = torch.stack([v.double().cpu() for v in self._watcher.losses])
            value = float(values.sum() if self.likelihood.reduction == "sum" else values.mean())
        elif returned is not None:
            value = float(returned)
        else:
            return None
        return value + self._penalty()

    def _penalty(self) -> float:
        groups = [g for g in self.param_groups if g["l2"]]
        return float(sum(0.5 * g["l2"] * sum(p.square().sum() for p in g["params"]) for g in groups))

    def _gradient(self) -> Vector:
        gradient: Vector = {}
        for name, member in self._members.members.items():
            group, p = self.param_groups[member.group], member.parameter
            if p.grad is None or group["frozen"]:
                continue
            gradient[name] = p.grad if not group["l2"] else p.grad.add(p, alpha=group["l2"])
        if not gradient:
            raise StepError(
                "no parameter has a gradient: call loss.backward() before step(), or pass a closure"
            )
        return gradient

    @staticmethod
    def _norm(gradient: Vector) -> float:
        return float(torch.stack([n.double() for n in torch._foreach_norm(list(gradient.values()))]).norm())

    def _finite(self, loss: float | None, norm: float, gradient: Vector) -> bool:
        """Raises or counts when something is not finite; nothing has been changed by then."""
        self._batch += 1
        if (loss is None or math.isfinite(loss)) and math.isfinite(norm):
            return True
        names = [name for name, g in gradient.items() if not torch.isfinite(g).all()]
        what = (
            f"the loss is {loss}"
            if loss is not None and not math.isfinite(loss)
            else "a gradient is not finite"
        )
        where = f" (gradients of {', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
        self._skipped += 1
        self._watcher.clear()
        if self._on_nonfinite == "raise":
            raise NonFiniteError(
                f"{what} in step {self._step + 1}, batch {self._batch}{where}; no parameter was changed. Look at that "
                'batch, or pass on_nonfinite="skip"'
            )
        self.info = StepInfo(
            step=self._step, loss=loss, damping=self.damping, grad_norm=norm, skipped=self._skipped
        )
        return False

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
        self._watcher.clear()
        self._curvature.restart(self._step)

    def _at(self, name: str) -> tuple[dict[str, Any], nn.Parameter, dict[str, Any]]:
        member = self._members.members[name]
        return self.param_groups[member.group], member.parameter, self.state[member.parameter]

    @contextmanager
    def _watching_paused(self) -> Iterator[None]:
        self._watcher.paused = True
        try:
            yield
        finally:
            self._watcher.paused = False

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
