"""The optimiser's estimates of F, one for each metric, and the directions they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import NonFiniteError, announce
from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import bare
from natgrad.metrics import Estimate, Euclidean, Metric, Observation
from natgrad.optim.coverage import Coverage, CoverageRow
from natgrad.optim.groups import Membership
from natgrad.optim.remainder import Remainder
from natgrad.tape import Block, Tape
from natgrad.tape.outputs import signal_passes

Fallback = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Curvature:
    """Observes batches for every metric in use, solves with each, and keeps what none covers apart.

    Attributes:
        tapes: one for each metric that observes.
        estimates: the metric, its estimate and its tape.
        generator: the source of the Monte-Carlo signals.
        observed: whether a batch was observed in the present step.
        trouble: what was not finite in a batch of the present step that could not be observed, or None.
    """

    def __init__(
        self,
        members: Membership,
        likelihood: Likelihood,
        seed: int,
        fallback: Fallback | None,
        small_steps: bool = False,
        relative: bool = False,
    ) -> None:
        self._members, self._likelihood, self._fallback = members, likelihood, fallback
        first = next(iter(members.parameters.values()))
        self.generator = torch.Generator(device=first.device).manual_seed(seed)
        self.estimates: list[tuple[Metric, Estimate, Tape]] = [
            (metric, metric.start(parameters), Tape(parameters)) for metric, parameters in members.by_metric()
        ]
        for _, estimate, _ in self.estimates:
            estimate.relative = relative
            if small_steps:
                estimate.expect_small_steps()
        self.tapes = [tape for _, estimate, tape in self.estimates if estimate.kind is not None]
        self.measures = any(not isinstance(metric, Euclidean) for metric, _, _ in self.estimates)
        self.remainder = Remainder()
        # Squares of real gradients are to be tempered like the metric's.
        self.power = min((metric.power for metric, _, _ in self.estimates), default=1.0)
        self.fallback_optimizer: torch.optim.Optimizer | None = None
        self.fallback_names: list[list[str]] = []
        self.observed = False
        self.needs_graph = False
        self.trouble: str | None = None
        self._warned = False
        self._due_now: bool | None = None
        self._noted: tuple[Mapping[str, Tensor], float] | None = None
        self._step = 0

    def due(self) -> bool:
        """Whether any estimate wants this step's batch. Decided once a step, for all of its micro-batches."""
        if self._due_now is None:
            self._due_now = any(e.kind is not None and e.due(self._step) for _, e, _ in self.estimates)
        return self._due_now

    def restart(self, step: int) -> None:
        """Begins the observations of a step."""
        self._step, self.observed, self._due_now, self.trouble = step, False, None, None
        self._noted = None

    def begins(self) -> bool:
        """Whether no parameter has a gradient, so that a step begins: no batch before this one is a part of it."""
        if any(member.parameter.grad is not None for member in self._members.members.values()):
            return False
        self.restart(self._step)
        return True

    def wants(self, gradient: Mapping[str, Tensor]) -> bool:
        """Whether this step's batch is to be observed for parameters with these gradients."""
        return self.due() and any(
            estimate.kind is not None
            and estimate.due(self._step)
            and any(n in gradient for n in estimate.parameters)
            for _, estimate, _ in self.estimates
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Opens the tapes for a forward pass with its graph, if this step's batch is wanted."""
        with ExitStack() as stack:
            if self.due():
                for tape in self.tapes:
                    stack.enter_context(tape.recording())
            stack.enter_context(torch.enable_grad())
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the observations of what the tapes hold, which is dropped after them.

        Raises:
            NonFiniteError: a signal was not finite.
        """
        try:
            yield
            self.require_finite()
        finally:
            for tape in self.tapes:
                tape.clear()

    def require_finite(self) -> None:
        """Raises NonFiniteError where a batch of the present step could not be observed."""
        if self.trouble is not None:
            raise NonFiniteError(self.trouble)

    def observe(self, outputs: tuple[Tensor, ...], targets: Any, examples: int) -> None:
        """Sends signals back from the outputs and lets every estimate that is due read them.

        Signals that are not finite enter no average: `trouble` then says where they were found.
        """
        self._members.check_unchanged()
        likelihood, step = self._likelihood, self._step
        for _, estimate, tape in self.estimates:
            if estimate.kind is None or not (estimate.due(step)):
                continue
            signals = likelihood.signals(bare(outputs), targets, estimate.kind, self.generator, examples)
            passes = signal_passes(tape, outputs, signals, examples)
            try:
                with torch.no_grad():
                    estimate.observe(
                        Observation(passes, examples, step, not self.observed, likelihood.reduction == "sum")
                    )
            except NonFiniteError as error:
                self.trouble = str(error)
        if self.trouble is None:
            self.observed = True

    def note(self, gradient: Mapping[str, Tensor], examples: float) -> None:
        """A step's gradients, for the diagonal of what no metric covers: Δ may be made of averaged ones.

        Args:
            gradient: ∇h by name.
            examples: how many the loss is a mean of; 1 where it is a sum.
        """
        self._noted = gradient, examples

    def direction(
        self,
        gradient: dict[str, Tensor],
        damping: Mapping[str, float],
        step: int,
        tried: bool = False,
    ) -> dict[str, Tensor]:
        """Δ = −(F̂ + λI)⁻¹∇h, with the remainder's F̂ where no metric has one and no fallback optimiser was given.

        Args:
            gradient: ∇h by name, of the parameters that move.
            damping: λ + η by name; a solve takes the greatest of its parameters.
            step: the present step.
            tried: whether λ is only tried, so that what is cached for the present one stays.
        """
        direction: dict[str, Tensor] = {}
        for _, estimate, tape in self.estimates:
            own = [name for name in estimate.parameters if name in gradient]
            covered = [name for name in own if estimate.covers(name)]
            # Where nothing is covered although a pass was recorded, nothing will be: that is no missing batch.
            if not own or (not covered and tape.uncovered):
                continue
            given = {name: gradient[name] for name in covered or own}
            solve = estimate.attempt if tried else estimate.solve
            solved = solve(given, max(damping[name] for name in own), step)
            for name in covered:
                same = solved[name] is gradient[name]
                direction[name] = -gradient[name] if same else solved[name].neg_()
        left = [name for name in gradient if name not in direction]
        self._announce(left)
        if self._fallback is None:
            direction |= self._of_remainder({name: gradient[name] for name in left}, damping)
        else:
            known = {name for names in self.fallback_names for name in names}
            self.add_fallback([name for name in left if name not in known])
        return {name: direction[name] for name in gradient if name in direction}

    def squared_length(self, direction: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> float:
        """An upper bound of Δᵀ F̂ Δ over all that a metric measures."""
        total = 0.0
        for _, estimate, _ in self.estimates:
            own = {n: direction[n] for n in estimate.parameters if n in direction and estimate.covers(n)}
            if own and estimate.kind is not None:
                total += estimate.squared_length(own, gradient)
        return total

    def _of_remainder(
        self, gradient: Mapping[str, Tensor], damping: Mapping[str, float]
    ) -> dict[str, Tensor]:
        if self._noted is not None:
            noted, examples = self._noted
            self.remainder.observe({name: noted[name] for name in gradient}, examples, self._step)
        return {name: -delta for name, delta in self.remainder.solve(gradient, damping, self.power).items()}

    def add_fallback(self, names: list[str]) -> None:
        """Gives these parameters to the user's fallback optimiser, which is made when there are some."""
        if not names or self._fallback is None:
            return
        self.fallback_names.append(names)
        parameters = [self._members.parameters[name] for name in names]
        if self.fallback_optimizer is None:
            self.fallback_optimizer = self._fallback(parameters)
        else:  # they had no gradient before
            self.fallback_optimizer.add_param_group({"params": parameters})

    def fall_back(self) -> None:
        """Steps the user's fallback optimiser, if there is one."""
        if self.fallback_optimizer is not None:
            self.fallback_optimizer.step()

    def _restore_fallback(self, saved: Any) -> None:
        if self.fallback_optimizer is not None:
            self.fallback_optimizer.load_state_dict(saved)

    def euclidean(self, name: str) -> bool:
        """Whether a parameter was given to a metric without curvature, so that no divergence bounds it."""
        return any(e.kind is None and name in e.parameters for _, e, _ in self.estimates)

    def measured(self, name: str) -> bool:
        """Whether a parameter's direction came from curvature, so that its length is a divergence."""
        return any(e.kind is not None and e.covers(name) for _, e, _ in self.estimates)

    def parts(self, direction: dict[str, Tensor], groups: int) -> list[list[str]]:
        """The names of a direction in at most `groups` runs of neighbouring layers; those without curvature apart."""
        plain = [name for name in direction if self.measures and not self.measured(name)]
        runs = self.layers([name for name in direction if name not in plain])
        count = min(groups, len(runs))
        parts = [
            [name for run in runs[k * len(runs) // count : (k + 1) * len(runs) // count] for name in run]
            for k in range(count)
        ]
        return parts + ([plain] if plain else [])

    def layers(self, names: Iterable[str]) -> list[list[str]]:
        """Names by the layer that they acted in."""
        layers: dict[str, list[str]] = {}
        for name in names:
            layers.setdefault(self._layer(name), []).append(name)
        return list(layers.values())

    def _layer(self, name: str) -> str:
        for _, _, tape in self.estimates:
            for weight, block in tape.blocks.items():
                if name in block.names:
                    return weight
        return name.rpartition(".")[0] or name

    def stages(self) -> dict[str, dict[str, str]]:
        """Which factorisations needed a later stage of the fallback."""
        return {
            block: stages for _, estimate, _ in self.estimates for block, stages in estimate.stages.items()
        }

    def coverage(self) -> Coverage:
        """Which rule covers which parameter."""
        rows = []
        for name, member in self._members.members.items():
            metric = self._members.metrics[member.group]
            _, estimate, tape = next(entry for entry in self.estimates if name in entry[1].parameters)
            block = next((b for b in tape.blocks.values() if name in b.names), None)
            label, factors, reason = type(metric).__name__, None, tape.uncovered.get(name, "")
            diagonal = (False, False)
            if estimate.kind is None:
                rule = "gradient"
            elif block is not None:
                rule, found = block.rule, estimate.diagonal_factors(block)
                if found is not None:
                    factors, diagonal = (block.columns, block.outputs), found
                if name in tape.elements:
                    rule = f"{rule} and {tape.elements[name]}"
            elif name in tape.elements and not reason:
                rule = tape.elements[name]
            elif estimate.covers(name):
                rule = "per-example gradients"
            else:
                rule = "fallback" if reason else "not seen"
            shape = tuple(member.parameter.shape)
            rows.append(CoverageRow(name, shape, label, rule, factors, reason, diagonal))
        return Coverage(tuple(rows))

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what `saving.save_state` gave."""
        self.generator.set_state(state["generator"].cpu())
        for k, (_, estimate, tape) in enumerate(self.estimates):
            estimate.load_state_dict(state["estimates"][k])
            tape.blocks = {name: Block(**saved) for name, saved in state["blocks"][k].items()}
            tape.elements, tape.uncovered = dict(state["elements"][k]), dict(state["uncovered"][k])
        self.remainder.load_state_dict(state["remainder"])
        groups, saved = state["fallback"] or ([], None)
        self.fallback_optimizer, self.fallback_names = None, []
        for names in groups:
            self.add_fallback(names)
        self._restore_fallback(saved)
        self.restart(state["step"])

    def _announce(self, names: list[str]) -> None:
        partly = [
            name
            for _, estimate, tape in self.estimates
            for name in tape.uncovered
            if name not in names and estimate.covers(name) and not estimate.whole
        ]
        if self._warned or not (names or partly):
            return
        self._warned = True
        how = (
            "a torch optimiser of yours" if self._fallback is not None else "a diagonal of squared gradients"
        )
        said = [f"no rule covers {', '.join(names)}: they follow {how}"] if names else []
        said += [f"the curvature of {', '.join(partly)} lacks the uses that no rule covers"] if partly else []
        announce(f"{'; '.join(said)} (see optimizer.coverage() and fallback=)")
