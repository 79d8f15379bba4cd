"""The optimiser's estimates of F, one for each metric, and the directions they give."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import CoverageWarning
from natgrad.likelihoods import Likelihood
from natgrad.metrics import Estimate, Euclidean, Metric, Observation
from natgrad.optim.coverage import Coverage, CoverageRow
from natgrad.optim.groups import Membership
from natgrad.tape import Block, Tape
from natgrad.tape.passes import SignalPass

Fallback = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Curvature:
    """Observes batches for every metric in use, solves with each, and keeps what none covers apart.

    Attributes:
        tapes: one for each metric that observes.
        estimates: the metric, its estimate and its tape.
        generator: the source of the Monte-Carlo signals.
    """

    def __init__(
        self, members: Membership, likelihood: Likelihood, seed: int, fallback: Fallback | None
    ) -> None:
        self._members, self._likelihood, self._fallback = members, likelihood, fallback
        first = next(iter(members.parameters.values()))
        self.generator = torch.Generator(device=first.device).manual_seed(seed)
        self.estimates: list[tuple[Metric, Estimate, Tape]] = [
            (metric, metric.start(parameters), Tape(parameters)) for metric, parameters in members.by_metric()
        ]
        self.tapes = [tape for _, estimate, tape in self.estimates if estimate.kind is not None]
        self.measures = any(not isinstance(metric, Euclidean) for metric, _, _ in self.estimates)
        self.fallback_optimizer: torch.optim.Optimizer | None = None
        self.observed = False
        self._warned = False
        self._due_now: bool | None = None

    def due(self, step: int) -> bool:
        """Whether any estimate wants this step's batch. Decided once a step, for all of its micro-batches."""
        if self._due_now is None:
            self._due_now = any(e.kind is not None and e.due(step) for _, e, _ in self.estimates)
        return self._due_now

    def restart(self, step: int) -> None:
        """Begins the next step's observations."""
        self.observed, self._due_now = False, None

    def observe(self, outputs: tuple[Tensor, ...], targets: Any, examples: int, step: int) -> None:
        """Sends signals back from the outputs and lets every estimate that is due read them."""
        likelihood = self._likelihood
        bare = outputs if len(outputs) > 1 else outputs[0]
        likelihood.check(bare, targets)
        for _, estimate, tape in self.estimates:
            if estimate.kind is None or not (estimate.due(step)):
                continue
            signals = likelihood.signals(bare, targets, estimate.kind, self.generator, examples)
            passes = _passes(tape, outputs, signals, examples)
            with torch.no_grad():
                estimate.observe(
                    Observation(passes, examples, step, not self.observed, likelihood.reduction == "sum")
                )
        self.observed = True

    def direction(self, gradient: dict[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        """Δ = −(F̂ + λI)⁻¹∇h where F̂ is known; the plain −∇h where it is not and no fallback optimiser was given."""
        direction: dict[str, Tensor] = {}
        for _, estimate, _ in self.estimates:
            own = [name for name in estimate.parameters if name in gradient]
            if not own:
                continue
            given = dict(gradient)
            covered = {name for name in estimate.parameters if estimate.covers(name)}
            for name in covered - gradient.keys():  # frozen, or unused in this pass: no slope there
                given[name] = torch.zeros_like(estimate.parameters[name])
            extra = max(
                (self._members.groups[self._members.members[n].group]["l2"] for n in own), default=0.0
            )
            solved = (
                estimate.solve(given, damping + extra, step) if covered or estimate.kind is not None else {}
            )
            for name in own:
                if name in solved:
                    direction[name] = (
                        solved[name].neg_() if solved[name] is not gradient[name] else -gradient[name]
                    )
        left = [name for name in gradient if name not in direction]
        if left:
            self._announce(left)
            if self._fallback is None:
                direction |= {name: -gradient[name] for name in left}
            elif self.fallback_optimizer is None:
                self.build_fallback(left)
        return {name: direction[name] for name in gradient if name in direction}

    def build_fallback(self, names: list[str]) -> None:
        """Makes the user's fallback optimiser for these parameters."""
        if self._fallback is not None:
            self.fallback_names = names
            self.fallback_optimizer = self._fallback([self._members.parameters[name] for name in names])

    def fall_back(self) -> None:
        """Steps the user's fallback optimiser, if there is one."""
        if self.fallback_optimizer is not None:
            self.fallback_optimizer.step()

    def measured(self, name: str) -> bool:
        """Whether a parameter's direction came from curvature, so that its length is a divergence."""
        return any(e.kind is not None and e.covers(name) for _, e, _ in self.estimates)

    def parts(self, direction: dict[str, Tensor], groups: int) -> list[list[str]]:
        """The names of a direction in at most `groups` runs of neighbouring layers, and those without curvature apart."""
        plain = [name for name in direction if self.measures and not self.measured(name)]
        layers: dict[str, list[str]] = {}
        for name in direction:
            if name not in plain:
                layers.setdefault(self._layer(name), []).append(name)
        runs = list(layers.values())
        count = min(groups, len(runs))
        parts = [
            [name for run in runs[k * len(runs) // count : (k + 1) * len(runs) // count] for name in run]
            for k in range(count)
        ]
        return parts + ([plain] if plain else [])

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
            if estimate.kind is None:
                rule = "gradient"
            elif block is not None:
                rule, factors = block.rule, (block.columns, block.outputs)
            elif estimate.covers(name):
                rule = "per-example gradients"
            else:
                rule = "fallback" if reason else "not seen"
            rows.append(CoverageRow(name, tuple(member.parameter.shape), label, rule, factors, reason))
        return Coverage(tuple(rows))

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what `saving.save_state` gave."""
        self.generator.set_state(state["generator"].cpu())
        for k, (_, estimate, tape) in enumerate(self.estimates):
            estimate.load_state_dict(state["estimates"][k])
            tape.blocks = {name: Block(**saved) for name, saved in state["blocks"][k].items()}
            tape.uncovered = dict(state["uncovered"][k])
        if state["fallback"] is not None:
            names, saved = state["fallback"]
            self.build_fallback(names)
            if self.fallback_optimizer is not None:
                self.fallback_optimizer.load_state_dict(saved)
        self.restart(state["step"])

    def _announce(self, names: list[str]) -> None:
        if self._warned:
            return
        self._warned = True
        how = "a torch optimiser of yours" if self._fallback is not None else "the plain gradient"
        warnings.warn(
            f"no rule covers {', '.join(names)}: they follow {how} (see optimizer.coverage() and fallback=)",
            CoverageWarning,
            stacklevel=4,
        )


def _passes(
    tape: Tape, outputs: tuple[Tensor, ...], signals: Iterator[Any], examples: int
) -> Iterator[SignalPass]:
    for signal in signals:
        parts = signal if isinstance(signal, tuple) else (signal,)
        yield SignalPass(tape, outputs, parts, examples)
