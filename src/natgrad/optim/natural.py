"""The natural gradient step: θ ← θ + αΔ + μδ₀ with Δ = −(F̂ + λI)⁻¹∇h."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import NonFiniteError, NotPositiveDefiniteError, StepError
from natgrad.likelihoods import Residuals
from natgrad.optim.evaluation import (
    dot,
    gradient_of,
    norm_of,
    require_batch,
    require_finite_direction,
)
from natgrad.optim.grafting import donor_step, grafted
from natgrad.optim.least_squares import LeastSquaresSteps
from natgrad.optim.model import FEWEST_EVENTS, Basis, Expansion, Probe, expand
from natgrad.optim.moves import add, forget, go, take_back, update_of, velocity_of
from natgrad.optim.plumbing import Vector
from natgrad.optim.policy import Policy
from natgrad.optim.trust_region import TrustRegionSteps, check_policy_call
from natgrad.steps import AdaptiveStep, FixedStep, Grafted, Promise, Witness, believable

# In the first step a smaller λ is taken if it leaves less than this part of the loss.
MUCH_BETTER = 0.75


class NaturalGradient(LeastSquaresSteps, TrustRegionSteps):
    """Natural gradient descent for a PyTorch model, in an ordinary training loop.

    With ``lr=None`` nothing is to be tuned: step size and momentum minimise the quadratic model with the exact Fisher
    information, and the damping follows the Levenberg–Marquardt rule (Martens & Grosse 2015, arXiv 1503.05671, §6–7).

    Args:
        model: the model that is trained; its forward pass is watched by a hook.
        likelihood: the torch.nn loss (or a natgrad likelihood) that is trained. A loss's calls are watched by a hook.
        params: parameters or groups of them; all trainable ones by default. A group may have its own ``lr`` (a factor
            of α where steps are adaptive), ``weight_decay``, ``metric`` and ``frozen``, and ``momentum`` where lr is
            a number.
        metric: the representation of F: ``"kfac"``, ``"diagonal"``, ``"dense"``, ``"euclidean"``, or an object such
            as ``natgrad.KFAC(kind="exact")``. ``"tempered"`` for classifiers and language models on mini-batches.
        lr: a fixed α, None to adapt it, `natgrad.Grafted("adam", lr)` for steps as long as Adam's, or
            `natgrad.TrustRegion()` for the steps of a policy (see `natgrad.policy`).
        momentum: a fixed μ; by default adapted with α, and 0 where lr is given or the metric is tempered.
        damping: a fixed λ or a strategy; by default Levenberg–Marquardt, 1e-3 where lr is given or where only a
            likelihood is (a loss computed inside the model can't be measured again), 1e-7 with a tempered metric, and
            `natgrad.RelativeDamping` beside ``Grafted``.
        weight_decay: decoupled decay, or ``natgrad.L2(η)`` inside the loss.
        fallback: makes a torch optimiser for parameters that no rule covers, such as
            ``lambda params: torch.optim.AdamW(params, lr=1e-3)``; by default they
            have a diagonal of squared gradients, as in Adam.
        outputs: what the likelihood reads of what the model returns, such as ``lambda o: o.logits``.
        targets: what it compares them with, of what the model is called with, such as ``lambda **batch:
            batch["labels"]``; for a likelihood, where the loss is computed inside the model.
        on_nonfinite: ``"raise"``, or ``"skip"`` to count such steps and go on.
        seed: of the Monte-Carlo signals.

    Raises:
        UnsupportedLossError: the loss has no likelihood; says what to pass instead.
        EmptyError: the model has no trainable parameter.
        ConfigError: an argument is out of range. UnknownNameError: no metric has that name.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | Policy | None = None) -> Tensor | float | None:  # type: ignore[override]
        """One step of natural gradient descent.

        Args:
            closure: clears the gradients, computes the loss, calls backward, and returns the loss; not needed in an
                ordinary loop. It returns residuals where no loss was given, and is a `natgrad.policy` for a policy.

        Returns:
            What the closure returned.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; nothing was changed.
            StepError: no gradient, no batch was seen, or two losses were sent back through one forward pass.
            ModelChangedError: the model's parameters are not those the optimiser was built with.
        """
        if isinstance(closure, Policy):
            return self._step_on_policy(closure)
        check_policy_call(self.step_size)
        if isinstance(self.likelihood, Residuals):
            return self._step_on_residuals(closure)
        if self._away:
            raise StepError(
                "step() inside optimizer.averaged(): the parameters there are for evaluation only"
            )
        self._seconds = {}
        with self._timed("evaluate"):
            returned = self._evaluate(closure)
            self._members.check_unchanged()
            loss = self._loss(returned)
            gradient = gradient_of(self._members.members, self.param_groups)  # ∇h(θ)
            norm = norm_of(gradient)
        if not self._finite(loss, norm, gradient):
            return returned
        measured = isinstance(self.step_size, AdaptiveStep) or self.damping_rule.due(self._step + 1)
        if measured or self._curvature.wants(gradient):
            require_batch(self._watcher, loss, measured)
        if isinstance(self.step_size, AdaptiveStep) and loss is not None:
            level = loss / self._unit()
            if self._alarm.rings(level) and not self.info.undone and self._is_to_blame():
                self._undo(loss, norm)
                return returned
            self._alarm = self._alarm.after(level)
        record: dict[str, Any] = {"loss": loss, "damping": self.damping, "grad_norm": norm}
        try:
            with self._timed("solve"):
                self._curvature.note(gradient, max(1, self._watcher.examples) / self._unit())
                donor: Vector = {}
                if isinstance(self.step_size, Grafted):
                    slope, donor = donor_step(gradient, self.step_size, self._at)
                else:
                    slope = self._averaged(gradient)
                if self._step == 0 and isinstance(self.step_size, AdaptiveStep):
                    record["damping"] = self.damping = self._first_damping(self.step_size, loss, slope)
                direction = self._curvature.direction(  # Δ = −(F̂ + λI)⁻¹∇h
                    slope, self._dampings(slope), self._step
                )
            if isinstance(self.step_size, FixedStep):
                record |= self._fixed(self.step_size, loss, gradient, direction)
            elif isinstance(self.step_size, Grafted):
                record |= self._grafted(self.step_size, direction, donor)
            elif direction:  # a fallback optimiser may have taken everything
                assert isinstance(self.step_size, AdaptiveStep)
                record |= self._adaptive(self.step_size, loss, gradient, slope, direction)
        except NonFiniteError as error:
            self._skip(f"{error},", loss, norm)
            return returned
        self._curvature.fall_back()
        self._finish(record)
        return returned

    def _fixed(
        self, size: FixedStep, loss: float | None, gradient: Vector, direction: Vector
    ) -> dict[str, Any]:
        """θ ← θ + lr · v, v ← μv + Δ."""
        scale = 1.0
        if self._curvature.measures:
            fastest = max(group["lr"] for group in self.param_groups)
            length = self._curvature.squared_length(direction, gradient)
            require_finite_direction(length)
            scale = size.scale(fastest, length)
        if scale != 1.0:
            direction = {n: d if self._curvature.euclidean(n) else d * scale for n, d in direction.items()}
        velocity = velocity_of(direction, self._at)
        first = self.param_groups[0]
        record: dict[str, Any] = {"alpha": scale * first["lr"], "momentum": first["momentum"]}
        due = self.damping_rule.due(self._step + 1)
        if due:
            update = {name: v * self._at(name)[0]["lr"] for name, v in velocity.items()}
            expansion, one = self._expand_update(update, loss, gradient)
            record["predicted"] = expansion.model.change(one)
        with self._timed("apply"):
            go(velocity, self._at)
        if due:
            record |= self._measure(expansion, one, record["predicted"])
        return record

    def _grafted(self, size: Grafted, direction: Vector, donor: Vector) -> dict[str, Any]:
        """θ ← θ + lr · Δ ‖a‖/‖Δ‖, layer by layer, with a the donor's step."""
        layers = self._curvature.layers([name for name in direction if self._curvature.measured(name)])
        step = grafted(direction, donor, layers)
        require_finite_direction(norm_of(step))
        with self._timed("apply"):
            go(step, self._at)
        first = self.param_groups[0]
        return {"alpha": first["lr"], "momentum": first["betas"][0]}

    def _adaptive(
        self, size: AdaptiveStep, loss: float | None, gradient: Vector, slope: Vector, direction: Vector
    ) -> dict[str, Any]:
        """θ ← θ + δ with δ = Σ_k α_k Δ_k + μδ₀, where α and μ minimise the quadratic model M."""
        previous = {n: self._at(n)[2]["last"] for n in direction if "last" in self._at(n)[2]}
        coarse = self._step < size.coarse
        parts = self._curvature.parts(direction, size.groups if coarse else 1)
        due = self.damping_rule.due(self._step + 1)
        if size.steady and not due and not self._pace.due(self._step, len(parts)):
            return self._paced(size, gradient, direction, parts, previous)
        # With μ = 0 only the slope along δ₀ is of use, and that needs no product with F.
        basis = Basis(direction, parts, {} if size.momentum == 0.0 else previous)
        with self._timed("model"):
            expansion = self._expand(basis, loss, gradient)
            model = expansion.model
            require_finite_direction(float(model.linear.sum() + model.curvature.sum()))
            usual = None if coarse or self._witness is None else self._witness.alpha
            last = basis.previous_index
            self._confirm(previous, gradient)
            c = whole = size.coefficients(model, last, usual, self._unit())
            best = max(float(whole[0]), 0.0)
            if size.steady:
                self._pace = self._pace.after(whole[: len(parts)].tolist(), self._step)
                whole[: len(parts)] = torch.tensor(self._pace.alphas, dtype=whole.dtype)
                c = whole = whole * believable(model, whole, self._unit())
            taken = size.relaxation(self._step, self._confirmation.ratio)
            if taken < 1.0:
                c = whole * taken
                if size.momentum is not None and last is not None:
                    c[last] = whole[last]
            elasticity = self._elasticity(basis, expansion, loss, gradient, slope) if due else None
        with self._timed("apply"):
            alphas = c[: len(parts)].tolist()
            momentum = 0.0 if last is None else float(c[last])
            update = self._update(direction, parts, alphas, momentum)
            factors = {self._at(name)[0]["lr"] for name in update}  # the groups' lr is a factor of the step
            predicted, length = None, None
            if len(factors) == 1:
                c = c * min(factors)
                predicted, length = model.change(c), model.fisher_norm(c)
                self._promise = Promise(float(model.linear @ whole) * min(factors), length**2, taken)
            elif due:  # groups that go unlike far leave the model's few directions
                expansion, c = self._expand_update(update, loss, gradient)
                predicted = expansion.model.change(c)
            add(update, parts, alphas, self._at)
        if not coarse:
            seen = best, float(model.damping[0, 0] / model.curvature[0, 0])
            self._witness = self._witness.after(*seen) if self._witness else Witness(*seen)
        record: dict[str, Any] = {
            "alpha": sum(alphas) / len(alphas),
            "momentum": momentum,
            "relaxation": taken,
            "predicted": predicted,
            "step_norm": length,
        }
        if due and predicted is not None:
            record |= self._measure(expansion, c, predicted, elasticity)
        return record

    def _paced(
        self,
        size: AdaptiveStep,
        gradient: Vector,
        direction: Vector,
        parts: list[list[str]],
        previous: Vector,
    ) -> dict[str, Any]:
        """The same with the α that the last measurements agree on."""
        require_finite_direction(dot(direction, gradient))
        self._confirm(previous, gradient)
        taken = size.relaxation(self._step, self._confirmation.ratio)
        alphas = [alpha * taken for alpha in self._pace.alphas]
        momentum = size.momentum if size.momentum and previous else 0.0
        with self._timed("apply"):
            add(self._update(direction, parts, alphas, momentum), parts, alphas, self._at)
        return {"alpha": sum(alphas) / len(alphas), "momentum": momentum, "relaxation": taken}

    def _confirm(self, previous: Vector, gradient: Vector) -> None:
        """What this batch says of the last step, where that promised something."""
        if previous and self._promise is not None:
            self._confirmation = self._confirmation.after(self._promise, dot(previous, gradient))
        self._promise = None

    def _update(
        self, direction: Vector, parts: list[list[str]], alphas: list[float], momentum: float
    ) -> Vector:
        """δ, now that θ joins the average."""
        self._join_average()
        update = update_of(direction, parts, alphas, momentum, self._at)
        forget(self._members.members.keys() - update.keys(), self._at)
        return update

    def _elasticity(
        self, basis: Basis, expansion: Expansion, loss: float | None, gradient: Vector, slope: Vector
    ) -> float | None:
        """How the decrease that M promises without λ grows where λ falls, if the rule wants to know."""
        smaller = self.damping_rule.trial(self.damping, self._witness)
        if smaller is None:
            return None
        try:
            direction = self._curvature.direction(
                slope, self._dampings(slope, smaller), self._step, tried=True
            )
        except (NonFiniteError, NotPositiveDefiniteError):
            return None
        other = Basis(direction, [list(direction)], basis.previous)
        tried = self._expand(other, loss, gradient, smaller, expansion.probe)
        now, then = expansion.model.promise, tried.model.promise
        return math.log(then / now) / math.log(self.damping / smaller) if min(now, then) > 0 else None

    def _first_damping(self, size: AdaptiveStep, loss: float | None, gradient: Vector) -> float:
        """λ for the first step: the initial one, or a tenth or hundredth of it where the loss after it is much less."""
        best, least = self.damping, math.inf
        trials = self.damping_rule.trials()
        for trial in trials if len(trials) > 1 and self._curvature.measures else ():
            try:
                direction = self._curvature.direction(gradient, self._dampings(gradient, trial), self._step)
            except (NonFiniteError, NotPositiveDefiniteError):
                if trial == trials[0]:
                    raise
                break  # too small a λ to factorise with
            if not direction:
                break
            parts = self._curvature.parts(direction, size.groups if size.coarse else 1)
            expansion = self._expand(Basis(direction, parts, {}), loss, gradient, trial)
            c = size.coefficients(expansion.model, None, None, self._unit())
            moved = {
                name: self._at(name)[1] + direction[name] * alpha
                for names, alpha in zip(parts, c.tolist(), strict=True)
                for name in names
            }
            with self._watcher.paused():
                after = expansion.probe.loss(moved)
            if not after < MUCH_BETTER * least:
                break
            best, least = trial, after
        return best

    def _expand(
        self,
        basis: Basis,
        loss: float | None,
        gradient: Vector,
        damping: float | None = None,
        probe: Probe | None = None,
    ) -> Expansion:
        """M on a basis, with F from a slice of the step's batches."""
        size = self.step_size
        fraction, steady = (size.fraction, size.steady) if isinstance(size, AdaptiveStep) else (0.25, False)
        events = FEWEST_EVENTS // 2 if steady else FEWEST_EVENTS
        with self._watcher.paused():
            return expand(
                basis,
                probe or Probe.of(self.model, self.likelihood, self._watcher, fraction, self._step, events),
                math.nan if loss is None else loss,
                gradient,
                self.damping if damping is None else damping,
                {name: self._at(name)[0]["l2"] for name in basis.direction},
            )

    def _expand_update(
        self, update: Vector, loss: float | None, gradient: Vector
    ) -> tuple[Expansion, Tensor]:
        """M along a step that is decided, and its one coefficient."""
        with self._timed("model"):
            basis = Basis(update, [list(update)], {})
            return self._expand(basis, loss, gradient), torch.ones(1, dtype=torch.float64)

    def _measure(
        self, expansion: Expansion, c: Tensor, predicted: float, elasticity: float | None = None
    ) -> dict[str, Any]:
        """ρ = [h(θ+δ) − h(θ)] / [M(δ) − M(0)], and λ after it."""
        with self._timed("ratio"), self._watcher.paused():
            actual = predicted + expansion.error(c)
        precision = torch.finfo(next(iter(self._members.parameters.values())).dtype).eps
        if math.isnan(actual) or abs(predicted) <= precision * abs(expansion.model.loss):
            return {
                "actual": None if math.isnan(actual) else actual
            }  # too small to be seen: ρ would be rounding
        ratio = actual / predicted if predicted < 0 else math.nan
        self.damping = self.damping_rule.update(self.damping, ratio, self._witness, elasticity)
        return {"actual": actual, "rho": ratio}

    def _averaged(self, gradient: Vector) -> Vector:
        """The gradient that Δ is made from: m ← βm + (1 − β)∇h, or βm + (1 − β)∇h once more."""
        if not isinstance(self.step_size, AdaptiveStep):
            return gradient
        keep = self.step_size.keep(self._step)
        averaged: Vector = {}
        for name, g in gradient.items():
            state = self._at(name)[2]
            if keep == 0.0 or "gradient" not in state:
                if self._step + 1 >= self.step_size.settle:
                    state["gradient"] = g.clone()
                averaged[name] = g
            else:
                m = state["gradient"].lerp_(g, 1.0 - keep)
                averaged[name] = m.lerp(g, 1.0 - keep) if self.step_size.nesterov else m
        return averaged

    def _is_to_blame(self) -> bool:
        """Whether the batch that rang the alarm would not have done so before the last step: some are just hard."""
        before = {
            name: self._at(name)[1] - self._at(name)[2].get("last", 0.0) for name in self._members.members
        }
        with self._watcher.paused():
            probe = Probe.of(self.model, self.likelihood, self._watcher, 1.0, self._step)
            return not self._alarm.rings(probe.loss(before) / self._unit())

    def _undo(self, loss: float, norm: float) -> None:
        """Takes the last step back, forgets what led to it, and trusts the model less."""
        take_back(self._members.members, self._at)
        damping, self._promise = self.damping, None
        self.damping = self.damping_rule.update(self.damping_rule.update(damping, math.nan), math.nan)
        # Where λ cannot say so, α has to start from less.
        before, self._witness = self._witness, None
        if before is not None and self.damping == damping:
            self._witness = replace(before, alpha=before.alpha / 4)
            self._pace = self._pace.slower(4.0)
        self._finish({"loss": loss, "damping": damping, "grad_norm": norm, "undone": True})
